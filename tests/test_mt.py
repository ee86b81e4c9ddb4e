"""pytest tests/test_mt.py

The loop, run tiny with real models: which prompts and models go where, when it stops, what is on record, how
it goes on after an interruption, and what it refuses to build on.
"""
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import filter as filter_script
import mt
import reward
import sampler
from common import run
from common.data import read_jsonl, write_jsonl
from common.parallel import Problem
from filter import win_rate

WORDS = dict(rounds=1, samples=3, max_new_tokens=12, max_length=64, policy_batch=2, rm_batch=4, beta=0.1,
             policy_lr=1e-3, rm_lr=1e-3, save_every=3, select_prompts=6, tau=0.0, sample_batch=16)
E_STEPS = ("round1/e1", "round1/e2", "round2/e1", "round2/e2")
TRAINED_FROM = []  # the folders that reward.train started from in the fixture `undisturbed`

@pytest.fixture(scope="module")
def words(tiny, prompts, tmp_path_factory):
    """words(rounds=2, …) -> the command line of a run in ./run, with 6 prompts for model selection and three
    subsets of 8. Two more prompts are left out: one is repeated, and one too long for an answer of 12."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl(path, [{"prompt": p} for p in [*prompts, prompts[3], "sad " * 85]])
    fixed = dict(policy=tiny(), rm=tiny(reward=True), prompts=path, out="run")

    def line(**changes):
        settings = fixed | WORDS | changes
        return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return line

@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    """The folder of a run of two rounds that nothing interrupted. What it printed is in `said` beside it."""
    folder, said, train = tmp_path_factory.mktemp("undisturbed"), io.StringIO(), reward.train
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr("sys.argv", ["mt.py", *words(rounds=2)])
        patch.setattr(reward, "train", lambda rm, *a, **b: TRAINED_FROM.append(rm) or train(rm, *a, **b))
        mt.main()
    (folder / "said").write_text(said.getvalue())
    return folder / "run"

@pytest.fixture
def here(monkeypatch, tmp_path):
    """Makes an empty folder the current one and returns the run folder in it. Runs make no report, which
    takes seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mt, "report", lambda out: None)
    return tmp_path / "run"

@pytest.fixture
def copy(undisturbed, here):
    """A copy of the run `undisturbed` in the current folder."""
    return Path(shutil.copytree(undisturbed, here, symlinks=True))

def prompts_of(path):
    return [row["prompt"] for row in read_jsonl(path)]

def selection(folder):
    return json.loads((folder / "selection.json").read_text())

def same_weights(a, b):
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)

def contents(folder):
    """{name: contents} of all files and links in a run folder but run.json, times and the report. The log's
    lines are sorted, since a phase that is repeated writes its lines at the end."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file() and path.name not in ("run.json", "timings.jsonl", "report.html", "report.png"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found | {"metrics.jsonl": sorted(found["metrics.jsonl"].splitlines())}

# ---------------------------------------------------------------- which prompts and models go where
def test_selection_prompts_and_subsets_are_disjoint_and_complete_and_depend_on_the_seed(
        undisturbed, prompts, words, here):
    def parts_of(out):
        return [prompts_of(out / "prompts" / f"{part}.jsonl") for part in ("select", "s0", "s1", "s2")]
    parts = parts_of(undisturbed)
    assert [len(part) for part in parts] == [6, 8, 8, 8]
    assert sorted(sum(parts, [])) == sorted(prompts) and sum(parts, []) != prompts
    for seed in (0, 1):
        o = run.parse(mt.Options, words(seed=seed, out=here / str(seed), samples=2))
        run.claim(o.out, o)
        mt.split(o, here / str(seed) / "prompts")
        assert (parts_of(here / str(seed)) == parts) == (seed == 0)

def test_each_step_of_a_round_has_its_own_subset_and_the_subsets_rotate(undisturbed):
    s = [prompts_of(undisturbed / "prompts" / f"s{i}.jsonl") for i in range(3)]
    for step, subset in (("round1/e1", 0), ("round1/e2", 2), ("round2/e1", 1), ("round2/e2", 0)):
        assert prompts_of(undisturbed / step / "samples.jsonl") == [p for p in s[subset] for _ in range(3)]
        for file in (undisturbed / step / "select").glob("*.jsonl"):
            assert prompts_of(file) == prompts_of(undisturbed / "prompts" / "select.jsonl")
    for name in ("new", "old", "comparisons"):
        assert prompts_of(undisturbed / "round1" / "m" / f"{name}.jsonl") == s[1]
        assert prompts_of(undisturbed / "round2" / "m" / f"{name}.jsonl") == s[2]

def test_every_m_step_starts_from_the_base_rm_and_the_last_rm_judges_e_steps(undisturbed, tiny):
    base = tiny(reward=True)
    assert [Path(folder).resolve() for folder in TRAINED_FROM] == [Path(base).resolve()] * 2
    judges = [selection(undisturbed / step)["rm"] for step in E_STEPS]
    assert judges == [base, *["run/round1/m/rm"] * 2, "run/round2/m/rm"]
    assert not same_weights(undisturbed / "round1" / "m" / "rm", undisturbed / "round2" / "m" / "rm")
    assert os.readlink(undisturbed / "policy") == "round2/e2/policy"
    assert os.readlink(undisturbed / "rm") == "round2/m/rm"

# ---------------------------------------------------------------- selection, τ and the switches
@pytest.mark.parametrize("update_rm, rates, kept, made", [
    (True, [0.6999, 0.5], [None], "e1"), (True, [0.6, 0.7, 0.3, 0.6999], ["step-2", None], "e1 e2 m"),
    (False, [0.7, 0.6, 0.3, 0.5], ["step-1", None], "e1 e2")])
def test_a_best_win_rate_below_tau_keeps_the_old_policy_and_ends_the_run(
        call, words, here, monkeypatch, tiny, update_rm, rates, kept, made, capsys):
    train, given = mt.dpo.train, iter(rates)

    def two_steps(*arguments, **settings):  # two checkpoints, however many pairs the tiny models give
        [(_, _, policy)] = train(*arguments, **settings)
        yield from ((step, 2, policy) for step in (1, 2))
    monkeypatch.setattr(mt.dpo, "train", two_steps)
    monkeypatch.setattr(filter_script, "win_rate", lambda *_: next(given))
    call(mt, *words(rounds=3, tau=0.7, update_rm=update_rm, policy_batch=32, save_every=1))
    assert sorted(path.name for path in here.glob("round*/*")) == made.split()
    assert [selection(here / "round1" / part)["chosen"] for part in ("e1", "e2")[:len(kept)]] == kept
    assert len(list(here.glob("round*/e?/policy"))) == len(kept) - 1
    assert not list(here.glob("round*/*/checkpoints"))
    said = capsys.readouterr().out
    assert "none reaches 0.7, so " in said and "WARNING: only 1 optimiser steps." in said
    assert "WARNING: with 6 --select_prompts a policy that is as good as before may reach --tau 0.7" in said
    finished = [row["finished"] for row in read_jsonl(here / "round1" / "e1" / "samples.jsonl")]
    assert ("WARNING: most responses are cut off" in said) == (np.mean(finished) < 0.5)
    assert same_weights(here / "policy", here / "round1" / "e1" / "policy" if len(kept) > 1 else tiny())
    assert same_weights(here / "rm", here / "round1" / "m" / "rm" if "m" in made else tiny(reward=True))

def test_the_checkpoint_with_the_highest_win_rate_is_kept_and_the_others_are_deleted(undisturbed):
    for folder in (undisturbed / step for step in E_STEPS):
        choice, scores = selection(folder), {
            file.stem: [row["score"] for row in read_jsonl(file)] for file in folder.glob("select/*.jsonl")}
        before, steps = scores.pop("before"), -(-len(read_jsonl(folder / "pairs.jsonl")) // 2)
        assert choice["win_rates"] == {step: win_rate(scores[step], before) for step in scores}
        assert scores.keys() == {"step-3", f"step-{steps}"} and steps == 4  # every 3 steps, and at the end
        assert choice["win_rates"][choice["chosen"]] == max(choice["win_rates"].values())
        assert not (folder / "checkpoints").exists()

def test_without_selection_the_last_checkpoint_is_kept_and_without_rm_updates_the_base_rm_judges(
        call, words, here, tiny, monkeypatch):
    saved, save = [], mt.models.save
    monkeypatch.setattr(mt.models, "save", lambda *a: saved.append(a[-1].name) or save(*a))
    call(mt, *words(select=False, tau=2.0, update_rm=False))
    assert sorted(path.name for path in (here / "round1").iterdir()) == ["e1", "e2"]
    for part in ("e1", "e2"):
        choice = selection(here / "round1" / part)
        assert (choice["chosen"], choice["win_rates"]) == ("step-4", {})
        assert choice["rm"] == tiny(reward=True) and not (here / "round1" / part / "select").exists()
    assert saved == ["step-4", "step-4"]  # of four steps, the last alone
    assert same_weights(here / "policy", here / "round1" / "e2" / "policy")
    assert same_weights(here / "rm", tiny(reward=True))

# ---------------------------------------------------------------- the record
def test_samples_and_pairs_are_on_record_with_scores_and_reasons(undisturbed):
    for step in E_STEPS:
        samples, pairs = (read_jsonl(undisturbed / step / f"{name}.jsonl") for name in ("samples", "pairs"))
        for row in samples:
            assert {"prompt", "response", "tokens", "finished", "score", "index"} <= row.keys()
            assert row["finished"] or row["tokens"] == 12
        assert pairs == filter_script.preference_pairs(samples)[0] and "shortest" in pairs[0]["reason"]

def test_every_training_pair_of_the_rm_leads_back_to_its_two_policies(undisturbed, monkeypatch, tiny):
    monkeypatch.chdir(undisturbed.parent)
    for n, before in ((1, tiny()), (2, "run/round1/e2/policy")):
        folder = Path("run") / f"round{n}"
        new, old, comparisons, rows = (read_jsonl(folder / "m" / f"{name}.jsonl") for name in (
            "new", "old", "comparisons", "preferences"))
        ranked = read_jsonl(folder / "e1" / "pairs.jsonl")
        assert selection(folder / "e1")["policy_before"] == before
        assert comparisons == filter_script.compare(new, old)
        assert len(rows) == sum(row["kept"] for row in comparisons) + len(ranked)
        for row in rows:
            compared = row["source"].endswith("m/comparisons.jsonl")
            sides = ("new", "old") if compared else ("chosen", "rejected")
            [origin] = [r for r in read_jsonl(row["source"]) if r["prompt"] == row["prompt"]]
            assert (row["chosen"], row["rejected"]) == tuple(origin[side] for side in sides)
            assert row["rejected_policy"] == before and origin.get("kept", True)
            assert row["chosen_policy"] == (str(folder / "e1" / "policy") if compared else before)

def test_settings_versions_results_and_metrics_are_on_record(undisturbed, words):
    note = json.loads((undisturbed / "run.json").read_text())
    assert note["settings"].keys() | {"out", "overwrite"} == vars(run.parse(mt.Options, words())).keys()
    assert {"python", "torch", "transformers", "numpy", "processes", "commit"} <= note["versions"].keys()
    assert {"mt.py", "filter.py", "common/training.py"} <= note["sources"].keys()
    for pattern in ("prompts", "round*/*/*.json*", "round*/*/select/*", "round*/*/policy", "round*/*/rm"):
        for path in undisturbed.glob(pattern):
            assert note["results"][str(path.relative_to(undisturbed))]["sha256"] == run.digest(path)
    lines = read_jsonl(undisturbed / "metrics.jsonl")
    for step in E_STEPS:
        steps = [row["step"] for row in lines if row["phase"] == f"{step}/checkpoints" and "loss" in row]
        assert steps == [*range(1, len(steps) + 1)] and steps
        rates = {row["checkpoint"]: row["win_rate"] for row in lines if row["phase"] == f"{step}/selection"}
        assert rates == selection(undisturbed / step)["win_rates"]

def test_each_rounds_policy_is_judged_by_the_base_rm_against_the_base(undisturbed, tiny, tmp_path):
    def scored(path):
        reward.score(tiny(reward=True), read_jsonl(path), tmp_path / "scored.jsonl", 4)
        return np.array([(row["score"], row["tokens"]) for row in read_jsonl(tmp_path / "scored.jsonl")]).T
    files = [undisturbed / "round1/e1/select/before.jsonl"]
    for step in (undisturbed / f"round{number}" / part for number in (1, 2) for part in ("e1", "e2")):
        files.append(step / "select" / f"{selection(step)['chosen']}.jsonl")
    lines, (others, _) = read_jsonl(undisturbed / "base.jsonl"), scored(files[0])
    assert [line["policy"] for line in lines] == ["base", "round 1 e1", "round 1", "round 2 e1", "round 2"]
    for line, file in zip(lines, files, strict=True):
        own, tokens = scored(file)
        assert (line["n"], line["tokens"]) == (6, tokens.mean())
        assert line["reward_r0"] == pytest.approx(own.mean(), abs=1e-6)
        assert line["reward_r0_se"] == pytest.approx(own.std(ddof=1) / 6**0.5)
        assert line["win_rate"] == pytest.approx((own > others).mean() + (own == others).mean() / 2)

def test_each_phase_reports_its_seconds_and_sampling_and_training_their_tokens_per_second(undisturbed):
    said = (undisturbed.parent / "said").read_text()
    times = {row["phase"]: row for row in read_jsonl(undisturbed / "timings.jsonl")}
    results = json.loads((undisturbed / "run.json").read_text())["results"]
    assert times.keys() == {str(Path(name).with_suffix("")) for name in results}
    for phase, row in times.items():
        slow = bool(re.search("/(samples|new|old|checkpoints|rm|select/.*)$", phase))
        assert ("tokens_per_second" in row) == slow
        assert re.search(rf"^{phase}: .*\d s{', [0-9]+ tokens a second' * slow}$", said, re.M)
    sampled = sum(row["tokens"] for row in read_jsonl(undisturbed / "round1" / "m" / "new.jsonl"))
    assert times["round1/m/new"]["tokens"] == sampled
    trained = [row for row in read_jsonl(undisturbed / "metrics.jsonl") if row["phase"] == "round1/m/rm"]
    assert times["round1/m/rm"]["tokens"] == trained[-1]["num_tokens"]

# ---------------------------------------------------------------- going on after an interruption
def test_a_finished_run_is_left_alone_and_its_links_do_not_move(call, words, copy, undisturbed, monkeypatch):
    for module, name in ((sampler, "generate"), (reward, "score"), (mt.dpo, "train"), (reward, "train")):
        monkeypatch.setattr(module, name, None)  # a call would fail
    link, moved = run.link, []
    monkeypatch.setattr(run, "link", lambda path, to: moved.append(Path(path).resolve() != Path(to).resolve())
                        or link(path, to))
    call(mt, *words(rounds=2, micro_batch=5, sample_batch=3, score_batch=3))  # they change only rounding
    assert contents(copy) == contents(undisturbed) and moved and not any(moved)

def test_a_run_may_get_more_rounds_but_not_fewer(call, words, here, undisturbed):
    call(mt, *words(rounds=1))
    call(mt, *words(rounds=2))
    assert contents(here) == contents(undisturbed)
    with pytest.raises(Problem, match=r"other settings.*\(rounds: 2 there, 1 now\)"):
        call(mt, *words(rounds=1))

def test_other_settings_and_inputs_are_refused_by_name_and_overwrite_begins_anew(
        call, words, here, written):
    prompts = written("own.jsonl", [{"prompt": f"sad {i}"} for i in range(9)])
    few = words(prompts=prompts, select_prompts=3, update_rm=False, select=False, policy_batch=1)
    call(mt, *few)
    before = contents(here)
    with pytest.raises(Problem, match=r"by --overwrite \(seed: 0 there, 3 now; samples: 3 there, 4 now\)"):
        call(mt, *few, "--seed", 3, "--samples", 4)
    written("own.jsonl", [{"prompt": f"sad {i}"} for i in range(10)])
    with pytest.raises(Problem, match=r"belongs to other .*\(file of --prompts: '\w+' there, '\w+' now\)"):
        call(mt, *few)
    assert contents(here) == before
    (here / "round9").mkdir()
    call(mt, *few, "--seed", 3, "--overwrite")
    assert contents(here) != before and contents(here).keys() == before.keys()
    assert not (here / "round9").exists()
    for text in ("{", "[]", '{"settings": []}', '{"settings": {}, "sources": 5}'):
        (here / "run.json").write_text(text)
        with pytest.raises(Problem, match="run.json is damaged"):
            call(mt, *few, "--overwrite")
    (here / "run.json").unlink()
    with pytest.raises(Problem, match="run exists and was not written by this command"):
        call(mt, *few, "--overwrite")
    assert (here / "round1" / "e2" / "policy").exists()

def test_changed_code_is_refused_by_name_and_a_changed_comment_is_not(script, written, tmp_path):
    fork, row = tmp_path / "fork", dict(prompt="a", tokens=1, finished=True)
    shutil.copytree(run.HOME / "common", fork / "common")
    shutil.copy(run.HOME / "filter.py", fork)
    written("scored.jsonl", [dict(row, response=str(i), score=i) for i in (0, 1)])

    def pairs():
        return script(fork / "filter.py", "--samples", "scored.jsonl", "--out", "pairs.jsonl", cwd=tmp_path)
    assert pairs().returncode == 0
    data, code = fork / "common" / "data.py", (fork / "filter.py").read_text()
    data.write_text(data.read_text().replace('"""', '"""Another docstring. ', 1) + "\n# a comment\n")
    assert "complete" in pairs().stdout
    (fork / "filter.py").write_text(code.replace("int(scores.argmin())", "int(scores.argmax())"))
    done = pairs()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(r"pairs.jsonl belongs to other .*\(filter.py: '\w+' there, '\w+' now\)", done.stderr)

# ---------------------------------------------------------------- results that were changed
def cut(path):
    """Remove the last line of a file."""
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))

def forget(path):
    """Make run.json not know the result."""
    change_note(path, lambda results, name: results.pop(name))

def make_stale(path):
    """Make run.json say that the result was made from something else."""
    change_note(path, lambda results, name: results[name]["made_from"].update(dict.fromkeys(
        results[name]["made_from"], "another digest")))

def change_note(path, change):
    note = json.loads(Path("run/run.json").read_text())
    change(note["results"], str(path.relative_to(Path.cwd() / "run")))
    Path("run/run.json").write_text(json.dumps(note))

@pytest.mark.parametrize("name, damage, message, delete", [
    ("prompts/s1.jsonl", cut, "run/prompts has changed since it was written", "prompts round1/e1 round2/m"),
    ("round1/m/comparisons.jsonl", cut, "has changed since it was", "round1/m/preferences.jsonl round1/e2"),
    ("round2/e1/selection.json", cut, "has changed since it was", "round2/e1/policy round2/m round2/e2"),
    ("round2/m/rm/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
     "run/round2/m/rm has changed since it was written", "round2/m/rm round2/e2"),
    ("round2/m/preferences.jsonl", make_stale, "is not made from this run/round2/", "round2/m/rm round2/e2"),
    ("round2/m/new.jsonl", forget, "exists, but this run has not written it", "round2/m/new.jsonl"),
    ("round2/e2/policy", shutil.rmtree, "is missing; put it", "round2/e2/select round2/e2/selection.json")])
def test_a_changed_result_is_refused_and_deleting_what_the_message_names_makes_the_same_again(
        call, words, copy, undisturbed, name, damage, message, delete):
    damage(copy / name)
    with pytest.raises(Problem, match=message) as problem:
        call(mt, *words(rounds=2))
    said, named = re.split(" delete | deleting ", str(problem.value))
    paths = {*re.findall(r"run/[\w./-]+", said if named.startswith("it or ") else named)}
    assert {f"run/{path}" for path in delete.split()} <= paths
    run.remove(*paths)
    call(mt, *words(rounds=2))
    assert contents(copy) == contents(undisturbed)

def test_what_a_killed_attempt_left_is_deleted_when_its_sources_have_changed(here):
    o, seen = mt.Options(out=str(here)), []
    source, result, left = (here / name for name in ("samples.jsonl", "pairs.jsonl", ".pairs.jsonl.parts"))

    @run.phase
    def attempt(o, source, path):
        seen.append(left.exists())
        left.write_text("")
        raise KeyboardInterrupt
    for number in range(2):
        run.claim(o.out, o)
        write_jsonl(source, [number])
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                attempt(o, source, result)
    assert seen == [False, True, False, True]

# ---------------------------------------------------------------- steps that can be replaced
def test_a_prompt_may_give_several_pairs_with_weights_and_filter_false_keeps_all_but_equal_texts(
        call, words, here, monkeypatch):
    single, compare, given = filter_script.preference_pairs, filter_script.compare, []

    def twice(samples):
        pairs, without = single(samples)
        given.append(len(pairs))
        return [pair | {"weight": weight} for pair in pairs for weight in (1.0, 0.5)], without
    monkeypatch.setattr(filter_script, "preference_pairs", twice)
    monkeypatch.setattr(filter_script, "compare", lambda new, old, on: compare(
        [new[0] | {"response": old[0]["response"]}, new[1] | {"score": -1e3}, *new[2:]], old, on))
    call(mt, *words(filter=False, select=False))
    for part in ("e1", "e2"):
        assert len(read_jsonl(here / "round1" / part / "pairs.jsonl")) == 2 * given[part == "e2"] > 0
    pairs, mixed, compared = (read_jsonl(here / "round1" / name) for name in (
        "e1/pairs.jsonl", "m/preferences.jsonl", "m/comparisons.jsonl"))
    assert [row.get("weight") for row in mixed if row["source"].endswith("pairs.jsonl")] == [
        pair["weight"] for pair in pairs]
    assert [row["kept"] for row in compared] == [row["new"] != row["old"] for row in compared]
    assert [row["kept"] for row in compared][:2] == [False, True]
    assert compared[1]["margin"] < -compared[1]["epsilon"]

# ---------------------------------------------------------------- the command line
def test_two_processes_on_two_nodes_make_the_same_first_samples_and_pairs_as_one(
        words, undisturbed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    command = [run.HOME / "mt.py", *words(select=False, sample_batch=2)]  # blocks for both processes
    nodes = [subprocess.Popen(  # two agents of torchrun, which here share one machine
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), *address,
         *command], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for node in (0, 1)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert ["30 prompts (1 repeated ones left out)" in text for text in said] == [True, False]
    for name in ("round1/e1/samples.jsonl", "round1/e1/pairs.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes()
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()

def test_a_problem_in_two_processes_is_said_once_and_ends_both(script, words, tmp_path):
    done = script("mt.py", *words(rm="nowhere"), processes=2, cwd=tmp_path)
    assert done.returncode and done.stderr.count("mt.py: nowhere: no such folder\n") == 1

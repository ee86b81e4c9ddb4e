"""pytest tests/test_mt.py

The loop, run tiny with real models: what goes where, when it stops, the record, going on.
"""
import importlib
import json
import os
import random
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import filter as filter_script
import mt
import reward
import sampler
from common import run
from common.data import read_jsonl, write_jsonl
from common.parallel import Problem
from filter import win_rate

ROOT = Path(__file__).parents[1]
WORDS = dict(rounds=1, samples=3, max_new_tokens=12, max_length=64, policy_batch=4, rm_batch=4, beta=0.1,
             policy_lr=1e-3, rm_lr=1e-3, save_every=1, select_prompts=6, tau=0.0, sample_batch=16)
TRAINED_FROM = []  # the folders that reward.train started from in the fixture `undisturbed`


@pytest.fixture(scope="module")
def words(tiny, prompts, tmp_path_factory):
    """words(rounds=2, …) -> the command line of a run in ./run: 6 prompts for selection, 3 subsets of 8."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl(path, [{"prompt": p} for p in [*prompts, prompts[3]]])
    fixed = dict(policy=tiny(), rm=tiny(reward=True), prompts=path, out="run")

    def line(**changes):
        settings = {**fixed, **WORDS, **changes}
        return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return line


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    """A run of two rounds that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["mt.py", *words(rounds=2)])
        train = reward.train
        patch.setattr(reward, "train", lambda rm, *a, **b: TRAINED_FROM.append(rm) or train(rm, *a, **b))
        mt.main()
    return folder / "run"


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


PARTS = ("select", "s0", "s1", "s2")


def prompts_of(path):
    return [row["prompt"] for row in read_jsonl(path)]


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


# ---------------------------------------------------------------- which prompts go where
def test_selection_prompts_and_subsets_are_disjoint_and_complete(undisturbed, prompts):
    parts = [prompts_of(undisturbed / "prompts" / f"{part}.jsonl") for part in PARTS]
    assert [len(part) for part in parts] == [6, 8, 8, 8]
    assert sorted(sum(parts, [])) == sorted(prompts)
    assert sum(parts, []) != prompts  # shuffled


def test_the_split_depends_on_the_seed_and_nothing_else(words, here, undisturbed):
    def split(seed, name):
        o = run.parse(mt.Options, words(seed=seed))
        o = replace(o, out=here / name)
        manifest.claim(o.out, o)
        mt.split(o)
        return [prompts_of(here / name / "prompts" / f"{part}.jsonl") for part in PARTS]
    assert split(0, "a") == [prompts_of(undisturbed / "prompts" / f"{part}.jsonl") for part in PARTS]
    assert split(1, "b") != split(0, "c")


def test_too_few_prompts_for_the_split_is_a_problem(call, words, here):
    with pytest.raises(Problem, match="30 different prompts; --select_prompts 28 .* need at least 31"):
        call(mt, *words(select_prompts=28))


def test_each_step_has_a_subset_of_its_own_and_they_rotate(undisturbed):
    s = [prompts_of(undisturbed / "prompts" / f"s{i}.jsonl") for i in range(3)]
    for number, (a, b, c) in ((1, (0, 1, 2)), (2, (1, 2, 0))):
        folder = undisturbed / f"round{number}"
        for part, subset in (("e1", a), ("e2", c)):
            assert prompts_of(folder / part / "samples.jsonl") == [p for p in s[subset] for _ in range(3)]
            assert set(prompts_of(folder / part / "pairs.jsonl")) <= set(s[subset])
            for file in (folder / part / "select").glob("*.jsonl"):
                assert prompts_of(file) == prompts_of(undisturbed / "prompts" / "select.jsonl")
        for side in ("new", "old", "comparisons"):
            assert prompts_of(folder / "m" / f"{side}.jsonl") == s[b]


def test_models_and_subsets_flow_from_step_to_step(monkeypatch):
    calls, links = [], []

    def e_step(o, policy, rm, prompts, folder):
        calls.append(("E", policy, rm, prompts, str(folder)))
        return f"π{sum(c[0] == 'E' for c in calls)}"

    def m_step(o, old_policy, new_policy, rm, prompts, folder, ranked):
        calls.append(("M", old_policy, new_policy, rm, prompts, str(folder), str(ranked)))
        return f"r{sum(c[0] == 'M' for c in calls)}"

    for name, value in dict(split=lambda *_: ["S0", "S1", "S2"], e_step=e_step, m_step=m_step,
                            link=lambda _, policy, rm, following: links.append((policy, rm))).items():
        monkeypatch.setattr(mt, name, value)
    mt.mutual_taught(mt.Options(policy="π0", rm="r0", rounds=4, out="run"))
    expected = []
    for t in range(4):
        (a, b, c), folder = (f"S{(t + i) % 3}" for i in range(3)), f"run/round{t + 1}"
        before, after, rm, new_rm = f"π{2 * t}", f"π{2 * t + 1}", f"r{t}", f"r{t + 1}"
        expected += [("E", before, rm, a, f"{folder}/e1"),
                     ("M", before, after, rm, b, f"{folder}/m", f"{folder}/e1/pairs.jsonl"),
                     ("E", after, new_rm, c, f"{folder}/e2")]
    assert calls == expected
    assert links[0] == ("π0", "r0") and links[-1] == ("π8", "r4")


def test_every_m_step_starts_from_the_base_rm_and_is_judged_by_the_current_one(undisturbed, tiny):
    base = tiny(reward=True)
    assert [Path(folder).resolve() for folder in TRAINED_FROM] == [Path(base).resolve()] * 2
    assert selection(undisturbed / "round1" / "e1")["rm"] == base
    assert selection(undisturbed / "round1" / "e2")["rm"] == "run/round1/m/rm"
    assert selection(undisturbed / "round2" / "e1")["rm"] == "run/round1/m/rm"
    assert selection(undisturbed / "round2" / "e2")["rm"] == "run/round2/m/rm"
    assert not same_weights(undisturbed / "round1" / "m" / "rm", undisturbed / "round2" / "m" / "rm")


# ---------------------------------------------------------------- selection, τ and the switches
def selection(folder):
    return json.loads((folder / "selection.json").read_text())


def phases(out):
    return sorted(str(path.relative_to(out)) for path in out.glob("round*/*"))


@pytest.mark.parametrize("update_rm", [True, False])
@pytest.mark.parametrize("rates, stopped_in", [([0.5] * 2, "e1"), ([0.7, 0.8, 0.3, 0.5], "e2")])
def test_a_best_win_rate_below_tau_keeps_the_old_policy_and_ends_the_run(
        call, words, here, monkeypatch, tiny, rates, stopped_in, update_rm, capsys):
    rates, given = iter(rates), []
    monkeypatch.setattr(filter_script, "win_rate", lambda *_: given.append(next(rates)) or given[-1])
    monkeypatch.setattr(mt, "train_policy", two_checkpoints(mt.train_policy))
    call(mt, *words(rounds=3, tau=0.6, update_rm=update_rm, policy_batch=32))
    folder = here / "round1" / stopped_in
    assert selection(folder)["chosen"] is None and len(selection(folder)["win_rates"]) == 2
    assert not (folder / "policy").exists() and not (folder / "checkpoints").exists()
    if stopped_in == "e1":
        assert phases(here) == ["round1/e1"]
        assert same_weights(here / "policy", tiny()) and same_weights(here / "rm", tiny(reward=True))
    else:
        assert selection(here / "round1" / "e1")["chosen"] == "step-2"  # the best, at 0.8
        assert phases(here) == ["round1/e1", "round1/e2"] + ["round1/m"] * update_rm
        assert same_weights(here / "rm", here / "round1" / "m" / "rm" if update_rm else tiny(reward=True))
        assert same_weights(here / "policy", here / "round1" / "e1" / "policy")
    assert "discarded, run stopped" in capsys.readouterr().out


def two_checkpoints(train_policy):
    """However many pairs the tiny models give: two checkpoints, the second a copy of the first."""
    def train(o, policy, pairs, path):
        [first] = train_policy(o, policy, pairs, path)
        second = first.with_name("step-2")
        if not second.exists():
            second.mkdir()
            for file in first.iterdir():
                os.link(file, second / file.name)
        return [first, second]
    return train


def test_a_win_rate_of_exactly_tau_is_enough(call, words, here, monkeypatch):
    rates = iter([0.7, 0.6999999])
    monkeypatch.setattr(filter_script, "win_rate", lambda *_: next(rates))
    call(mt, *words(tau=0.7, update_rm=False, policy_batch=32))
    assert [selection(here / "round1" / part)["chosen"] for part in ("e1", "e2")] == ["step-1", None]


def test_the_checkpoint_with_the_highest_win_rate_is_kept_and_the_others_go(undisturbed, tiny):
    for folder in (undisturbed / f"round{n}" / part for n in (1, 2) for part in ("e1", "e2")):
        choice = selection(folder)
        before = [row["score"] for row in read_jsonl(folder / "select" / "before.jsonl")]
        for step, rate in choice["win_rates"].items():
            after = [row["score"] for row in read_jsonl(folder / "select" / f"{step}.jsonl")]
            assert rate == win_rate(after, before) and len(after) == 6
        assert choice["win_rates"][choice["chosen"]] == max(choice["win_rates"].values())
        assert not (folder / "checkpoints").exists()
        steps = -(-len(read_jsonl(folder / "pairs.jsonl")) // 4)  # one checkpoint each
        assert list(choice["win_rates"]) == [f"step-{i + 1}" for i in range(steps)]


def test_without_selection_the_last_checkpoint_is_kept_whatever_tau(call, words, here):
    call(mt, *words(select=False, tau=2.0))
    for part in ("e1", "e2"):
        steps = -(-len(read_jsonl(here / "round1" / part / "pairs.jsonl")) // 4)
        choice = selection(here / "round1" / part)
        assert (choice["chosen"], choice["win_rates"]) == (f"step-{steps}", {})
        assert not (here / "round1" / part / "select").exists()
    assert same_weights(here / "policy", here / "round1" / "e2" / "policy")


def test_without_rm_updates_there_is_no_m_step_and_the_base_rm_judges(call, words, here, tiny):
    call(mt, *words(update_rm=False))
    assert phases(here) == ["round1/e1", "round1/e2"]
    assert {selection(here / "round1" / part)["rm"] for part in ("e1", "e2")} == {tiny(reward=True)}
    assert same_weights(here / "policy", here / "round1" / "e2" / "policy")
    assert same_weights(here / "rm", tiny(reward=True))


def test_without_the_filter_all_comparisons_but_identical_texts_train_the_rm(call, words, here, monkeypatch):
    compare = filter_script.compare
    monkeypatch.setattr(filter_script, "compare", lambda new, old, on: compare(
        [new[0] | {"response": old[0]["response"]}, new[1] | {"score": -1e3}, *new[2:]], old, on))
    call(mt, *words(filter=False))
    rows = read_jsonl(here / "round1" / "m" / "comparisons.jsonl")
    assert [row["kept"] for row in rows] == [row["new"] != row["old"] for row in rows]
    assert [row["kept"] for row in rows][:2] == [False, True] and rows[1]["margin"] < -rows[1]["epsilon"]


# ---------------------------------------------------------------- the record
def test_samples_and_pairs_are_on_record_with_scores_and_reasons(undisturbed):
    for part in ("e1", "e2"):
        samples = read_jsonl(undisturbed / "round2" / part / "samples.jsonl")
        for row in samples:
            assert {"prompt", "response", "tokens", "finished", "score", "index"} <= row.keys()
            assert row["finished"] or row["tokens"] == 12
        by_prompt = {}
        for row in samples:
            by_prompt.setdefault(row["prompt"], []).append(row)
        pairs = read_jsonl(undisturbed / "round2" / part / "pairs.jsonl")
        assert pairs
        for pair in pairs:
            group = by_prompt[pair["prompt"]]
            chosen, rejected = group[pair["chosen_index"]], group[pair["rejected_index"]]
            for side, row in (("chosen", chosen), ("rejected", rejected)):
                assert pair[side] == row["response"]
                assert all(pair[f"{side}_{key}"] == row[key] for key in ("score", "tokens", "finished"))
            above = [row for row in group if row["score"] > np.mean([row["score"] for row in group])]
            assert chosen["tokens"] == min(row["tokens"] for row in above) and chosen in above
            assert rejected["score"] == min(row["score"] for row in group)
            assert "shortest" in pair["reason"]


def test_comparisons_kept_and_dropped_are_on_record_with_margin_and_epsilon(undisturbed):
    for folder in (undisturbed / f"round{n}" / "m" for n in (1, 2)):
        new, old = (read_jsonl(folder / f"{side}.jsonl") for side in ("new", "old"))
        epsilon = np.std([row["score"] for row in old])
        for row, n, o in zip(read_jsonl(folder / "comparisons.jsonl"), new, old, strict=True):
            assert (row["new"], row["old"]) == (n["response"], o["response"])
            assert row["margin"] == pytest.approx(n["score"] - o["score"])
            assert row["epsilon"] == pytest.approx(epsilon)
            assert row["kept"] == (row["margin"] > -row["epsilon"] and row["new"] != row["old"])


def test_every_training_pair_of_the_rm_leads_back_to_its_two_policies(undisturbed, monkeypatch, tiny):
    monkeypatch.chdir(undisturbed.parent)
    for n in (1, 2):
        folder = Path("run") / f"round{n}"
        before = selection(folder / "e1")["policy_before"]
        assert before == (tiny() if n == 1 else "run/round1/e2/policy")
        rows = read_jsonl(folder / "m" / "preferences.jsonl")
        kept = [row for row in read_jsonl(folder / "m" / "comparisons.jsonl") if row["kept"]]
        ranked = read_jsonl(folder / "e1" / "pairs.jsonl")
        assert len(rows) == len(kept) + len(ranked)
        for row in rows:
            comparison = row["source"].endswith("m/comparisons.jsonl")
            sides = ("new", "old") if comparison else ("chosen", "rejected")
            [origin] = [r for r in read_jsonl(row["source"]) if r["prompt"] == row["prompt"]]
            assert (row["chosen"], row["rejected"]) == tuple(origin[side] for side in sides)
            assert row["rejected_policy"] == before
            assert row["chosen_policy"] == (str(folder / "e1" / "policy") if comparison else before)
            assert Path(row["chosen_policy"]).exists()


def test_win_rates_settings_versions_and_metrics_are_on_record(undisturbed, words):
    note = json.loads((undisturbed / "run.json").read_text())
    assert note["settings"]["tau"] == 0.0 and note["settings"]["update_rm"] is True
    assert note["settings"].keys() | {"out"} == vars(run.parse(mt.Options, words())).keys()
    assert {"python", "torch", "transformers", "numpy", "processes", "commit"} <= note["versions"].keys()
    lines = read_jsonl(undisturbed / "metrics.jsonl")
    for n in (1, 2):
        for part in ("e1", "e2"):
            steps = [row for row in lines if row["phase"] == f"round{n}/{part}/checkpoints" and "loss" in row]
            assert [row["step"] for row in steps] == list(range(1, len(steps) + 1)) and steps
            assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= steps[0].keys()
            pairs = len(read_jsonl(undisturbed / f"round{n}" / part / "pairs.jsonl"))
            assert [row["batch"] for row in steps] == [4] * (pairs // 4) + [pairs % 4] * (pairs % 4 > 0)
            rates = {row["checkpoint"]: row["win_rate"] for row in lines
                     if row["phase"] == f"round{n}/{part}/selection"}
            assert rates == selection(undisturbed / f"round{n}" / part)["win_rates"]
        assert [row for row in lines if row["phase"] == f"round{n}/m/rm" and "accuracy" in row]


def test_each_rounds_policy_is_judged_by_the_base_rm_against_the_base(undisturbed, tiny, tmp_path):
    def rewards(path):
        reward.score(tiny(reward=True), read_jsonl(path), tmp_path / "scored.jsonl", 4)
        return np.array([row["score"] for row in read_jsonl(tmp_path / "scored.jsonl")])
    lines = read_jsonl(undisturbed / "base.jsonl")
    assert [line["policy"] for line in lines] == ["base", "round 1", "round 2"]
    base = rewards(undisturbed / "round1/e1/select/before.jsonl")
    for number, line in enumerate(lines):
        step = undisturbed / f"round{number}" / "e2"
        answers = step / "select" / f"{selection(step)['chosen']}.jsonl" if number else \
            undisturbed / "round1/e1/select/before.jsonl"
        own, rows = rewards(answers), read_jsonl(answers)
        assert line["n"] == len(rows) == 6
        assert line["reward_r0"] == pytest.approx(own.mean())
        assert line["reward_r0_se"] == pytest.approx(own.std(ddof=1) / 6**0.5)
        assert line["win_rate"] == pytest.approx((own > base).mean() + (own == base).mean() / 2)
        assert line["tokens"] == np.mean([row["tokens"] for row in rows])
        assert line["finished"] == np.mean([row["finished"] for row in rows])


def test_seconds_and_tokens_per_second_of_every_long_phase_are_on_record(undisturbed):
    times = {row.pop("phase"): row for row in read_jsonl(undisturbed / "timings.jsonl")}
    for n in (1, 2):
        for part, names in (("e1", ["samples", "checkpoints", "select/before"]), ("m", ["new", "old", "rm"]),
                            ("e2", ["samples", "checkpoints", "select/before"])):
            for name in names:
                row = times[f"round{n}/{part}/{name}"]
                assert row["seconds"] > 0
                assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], 0.01)
    sampled = sum(row["tokens"] for row in read_jsonl(undisturbed / "round1" / "m" / "new.jsonl"))
    assert times["round1/m/new"]["tokens"] == sampled
    lines = [row for row in read_jsonl(undisturbed / "metrics.jsonl") if "num_tokens" in row]
    for name in ("e1/checkpoints", "m/rm"):
        last = [row["num_tokens"] for row in lines if row["phase"] == f"round1/{name}"][-1]
        assert times[f"round1/{name}"]["tokens"] == last


def test_every_long_phase_says_what_it_is_made_from_and_its_time_and_what_is_left(
        call, words, here, capsys, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mt, "m_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(mt, *words(rounds=2))
    monkeypatch.setattr(progress, "BEGUN", {})  # as in another process
    call(mt, *words(rounds=2))
    said = capsys.readouterr().out
    samples = (f"round1/e1/samples: from policy {tiny()}, rm {tiny(reward=True)}, "
               "prompts prompts/s0.jsonl (8 rows)\n")
    assert said.count(samples) == 1
    for name in ("e1/samples", "e1/checkpoints", "m/new", "m/rm", "e2/samples"):
        assert len(re.findall(rf"round1/{name}: \d+ s, \d+ tokens a second, \d+% of the run", said)) == 1
    assert f"policy: run/policy (a link to {here / 'round2' / 'e2' / 'policy'})\n" in said
    assert f"reward model: run/rm (a link to {here / 'round2' / 'm' / 'rm'})\n" in said
    assert re.search(r"\ntime: \d+ s, sampling and scoring \d+%, policy training \d+%, reward model tr", said)
    for module, command in re.findall(r"^  python (\w+)\.py (.*)", said, re.MULTILINE):  # as they stand
        call(importlib.import_module(module), *shlex.split(command))
    assert "6 prompts, win rate 0." in capsys.readouterr().out and len(read_jsonl("run-next.jsonl")) == 30
    steps = re.findall(r"^(?:going on: )?round \d, .*step.*", said, re.MULTILINE)
    assert [re.sub(r"about \d+ s if.*", "", step) for step in steps] == [
        "round 1, E-step", "going on: round 1, M-step; at most 5 steps left, ",
        "round 1, second E-step; at most 4 steps left, ", "round 2, E-step; at most 3 steps left, ",
        "round 2, M-step; at most 2 steps left, ", "round 2, second E-step; at most 1 step left, "]


def test_a_phase_that_goes_on_has_no_tokens_per_second(call, words, here, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reward, "score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(mt, *words())
    call(mt, *words())
    assert "round1/e1/samples: goes on, from policy" in capsys.readouterr().out
    with open(here / "timings.jsonl") as file:
        assert json.loads(file.readline()).keys() == {"phase", "seconds"}


def test_the_last_models_are_at_out_policy_and_out_rm_and_load(undisturbed):
    assert same_weights(undisturbed / "policy", undisturbed / "round2" / "e2" / "policy")
    assert same_weights(undisturbed / "rm", undisturbed / "round2" / "m" / "rm")
    for auto, name in ((AutoModelForCausalLM, "policy"), (AutoModelForSequenceClassification, "rm")):
        _, info = auto.from_pretrained(undisturbed / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(undisturbed / name).chat_template


def test_the_next_commands_hold_where_a_path_has_a_space_and_no_prompts_are_held_out(tmp_path, capsys):
    progress.say_end(mt.Options(policy="a b", rm="r", out=str(tmp_path / "my run"), select_prompts=0))
    commands = re.findall(r"^  python (.*)", capsys.readouterr().out, re.MULTILINE)
    for words, out in zip(map(shlex.split, commands), ("my run-next.jsonl", "my run-next"), strict=True):
        given = dict(zip(words[-6::2], words[-5::2]))
        assert given == {"--prompts": f"{tmp_path}/my run/prompts/s0.jsonl", "--max_new_tokens": "1024",
                         "--out": f"{tmp_path}/{out}"}
    assert f"{tmp_path}/my run/policy" in words and "a b" in words


# ---------------------------------------------------------------- samples from elsewhere
@pytest.mark.parametrize("damage, message", [
    (lambda rows: rows, ""),
    (lambda rows: rows[:-1], "23 rows; 3 .* to each of 8 prompts are needed.* row 24 leaves;"),
    (lambda rows: rows[::-1], "prompts' order, which row 1 leaves;"),
    (lambda rows: [{**r, "index": 0} for r in rows], "`index`"),
    (lambda rows: [{**r, "prompt": "other"} for r in rows], "are needed"),
    (lambda rows: [{**r, "tokens": "3"} for r in rows], "the tokens '3' is not"),
    (lambda rows: [{**r, "top_p": 0.5} for r in rows], "with top_p 0.5, the run has 0.95"),
    (lambda rows: [{**r, "temperature": 1.0} for r in rows], "with temperature 1.0, the run has 0.8")])
def test_samples_from_elsewhere_are_taken_in_place_and_checked(
        call, words, here, monkeypatch, undisturbed, capsys, damage, message):
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "sample", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(mt, *words())  # the prompts are split
        rows = read_jsonl(undisturbed / "round1" / "e1" / "samples.jsonl")
        rows = [{k: v for k, v in r.items() if k not in ("score", "rm")} | {"temperature": 0.8} for r in rows]
        write_jsonl(here / "round1" / "e1" / "samples.unscored.jsonl", damage(rows))
        patch.setattr(mt, "make_pairs", lambda *_: exit())  # far enough
        with pytest.raises(Problem if message else SystemExit, match=message or None):
            call(mt, *words())
    assert bool(message) != (here / "round1" / "e1" / "samples.jsonl").exists()
    assert bool(message) != ("24 responses that are there are taken" in capsys.readouterr().out)


# ---------------------------------------------------------------- going on
class Killed(BaseException):
    pass


def kill_at(monkeypatch, count, after):
    """From now on, the process dies before or after its `count`-th renaming or removal of something."""
    left = [count]

    def wrap(real):
        def replaced(*words, **more):
            left[0] -= 1
            if left[0] == 0 and not after:
                raise Killed
            result = real(*words, **more)
            if left[0] == 0:
                raise Killed
            return result
        return replaced
    for module, name in ((os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))


def files(run):
    """What a person reads in a run folder: name -> bytes, without what differs by processes and by time."""
    paths = (path.relative_to(run) for path in sorted(run.rglob("[!.]*.json*"))
             if path.name not in ("run.json", "timings.jsonl"))
    return {str(path): (run / path).read_bytes() for path in paths
            if not any(part in ("policy", "rm") or part[0] == "." for part in path.parts)}


@pytest.fixture(scope="module")
def disturbed(words, tmp_path_factory):
    """The run of `undisturbed`, killed at one rename or removal after the other until an attempt succeeds."""
    folder, rng, kills, done = tmp_path_factory.mktemp("disturbed"), random.Random(0), 0, False
    while not done:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("sys.argv", ["mt.py", *words(rounds=2)])
            kill_at(patch, rng.randint(6, 16), after=rng.random() < 0.5)
            try:
                mt.main()
                done = True
            except Killed:
                kills += 1
    assert kills > 8
    return folder / "run"


def test_killed_at_any_rename_a_run_goes_on_to_the_same_result(disturbed, undisturbed):
    ours, theirs = files(disturbed), files(undisturbed)
    assert [name for name in theirs if ours.get(name) != theirs[name]] == []
    for name in ("policy", "rm", "round1/e1/policy", "round1/m/rm", "round1/e2/policy"):
        assert same_weights(disturbed / name, undisturbed / name)


def test_a_run_that_was_killed_leaves_nothing_behind_in_the_end(disturbed, undisturbed):
    ours, theirs = ({path.relative_to(run) for path in run.rglob("*")} for run in (disturbed, undisturbed))
    assert sorted(map(str, ours - theirs)) == []


def test_a_kill_while_the_losers_are_deleted_does_not_stop_the_run(call, words, here):
    with pytest.MonkeyPatch.context() as patch:
        remove = run.remove

        def killed(path):
            if Path(path).name == "checkpoints":
                raise Killed
            remove(path)
        patch.setattr(run, "remove", killed)
        with pytest.raises(Killed):
            call(mt, *words(update_rm=False))
    call(mt, *words(update_rm=False))
    assert same_weights(here / "policy", here / "round1" / "e2" / "policy")
    assert not list(here.rglob("checkpoints"))


def test_a_finished_run_is_left_alone(call, words, undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed.parent)
    before = files(undisturbed)
    for module, name in ((sampler, "generate"), (reward, "score"), (mt.dpo, "train"), (reward, "train")):
        monkeypatch.setattr(module, name, None)  # a call would fail
    moved = []
    monkeypatch.setattr(run, "link", lambda *paths: moved.append(len({Path(p).resolve() for p in paths}) > 1))
    call(mt, *words(rounds=2))
    assert files(undisturbed) == before and not any(moved)


def test_another_setting_in_the_same_folder_is_refused_with_a_list(call, words, undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed.parent)
    before = files(undisturbed)
    with pytest.raises(Problem, match="another run; .*seed: 0 there, 3 now; samples: 3 there, 4 now"):
        call(mt, *words(rounds=2, seed=3, samples=4))
    assert files(undisturbed) == before


def test_other_contents_and_another_scripts_folder_are_refused(call, tiny, written, pairs, copy):
    row = dict(prompt="a", response="b", tokens=1, finished=True)
    for texts in ("bc", "bd"):
        written("scored.jsonl", [dict(row, score=i, response=text) for i, text in enumerate(texts)])
        if texts == "bc":
            call(filter_script, "--samples", "scored.jsonl", "--out", "pairs.jsonl")
    with pytest.raises(Problem, match="another run; .*the file of --samples is another one"):
        call(filter_script, "--samples", "scored.jsonl", "--out", "pairs.jsonl")
    with pytest.raises(Problem, match="another run; .*rounds: 2 there, None now"):
        call(mt.dpo, "--model", tiny(), "--pairs", written("dpo.jsonl", pairs[:2]), "--out", "run")


def test_a_run_may_go_on_with_other_batch_sizes_that_only_round(call, words, undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed.parent)
    before = files(undisturbed)
    call(mt, *words(rounds=2, micro_batch=5, sample_batch=3, score_batch=3))
    assert files(undisturbed) == before


@pytest.mark.parametrize("script, words", [
    (filter_script, ["--samples", "scored.jsonl", "--out", "pairs.json"]),
    (mt.dpo, ["--model", "MODEL", "--pairs", "pairs.jsonl", "--out", "policy.jsonl"])])
def test_an_out_of_the_wrong_kind_is_a_problem(call, tiny, written, pairs, here, script, words):
    row = dict(prompt="a", response="b", tokens=1, finished=True)
    written("scored.jsonl", [dict(row, score=i) for i in (0, 1)])
    written("pairs.jsonl", pairs[:2])
    with pytest.raises(Problem, match="in .jsonl"):
        call(script, *[tiny() if word == "MODEL" else word for word in words])


@pytest.fixture
def copy(undisturbed, here, monkeypatch):
    """A copy of the run of `undisturbed`, in the current folder."""
    shutil.copytree(undisturbed, here, symlinks=True)
    return here


def test_a_finished_run_goes_on_with_more_rounds_and_not_with_fewer(call, words, here, undisturbed):
    call(mt, *words(rounds=1))
    call(mt, *words(rounds=2))
    assert {name: text for name, text in files(here).items() if name != "run.json"} == files(undisturbed)
    assert json.loads((here / "run.json").read_text())["settings"]["rounds"] == 2
    with pytest.raises(Problem, match="another run; .*rounds: 2 there, 1 now"):
        call(mt, *words(rounds=1))


def test_other_code_in_the_same_folder_is_refused_and_named(script, words, tmp_path):
    for file in [*ROOT.glob("*.py"), *ROOT.glob("evals/*.py")]:
        (tmp_path / "fork" / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "fork" / file.relative_to(ROOT))

    def run_fork(**changes):
        return script(tmp_path / "fork" / "mt.py", *words(update_rm=False, **changes), cwd=tmp_path)
    assert run_fork().returncode == 0
    before = files(tmp_path / "run")
    path = tmp_path / "fork" / "filter.py"
    path.write_text(path.read_text().replace("int(scores.argmin())", "int(scores.argmax())"))
    (tmp_path / "fork" / "evals" / "stats.py").open("a").write("# what only looks may change\n")
    done = run_fork()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "run was made by other code, filter.py changed since; choose another --out" in done.stderr
    assert files(tmp_path / "run") == before

    note = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(note | {"sources": None}))
    assert run_fork().returncode == 0  # as the message says
    assert files(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sources"] != note["sources"]


@pytest.mark.parametrize("gone, older, made_from, delete", [
    ("round1/m", "round1/e2/samples.jsonl", "round1/m/new.jsonl",
     "round1/e2 round2/e1 round2/e2 round2/m"),
    ("round2/e1/pairs.jsonl", "round2/e1/selection.json", "round2/e1/pairs.jsonl",
     "round2/e1/checkpoints round2/e1/selection.json round2/e2 round2/m"),
])
def test_a_result_older_than_what_it_was_made_from_is_refused_with_what_to_delete(
        call, words, copy, undisturbed, gone, older, made_from, delete):
    run.remove(copy / gone)
    with pytest.raises(Problem) as problem:
        call(mt, *words(rounds=2))
    said, paths = str(problem.value).split("; to make it again delete ")
    assert said == f"run/{older} is older than run/{made_from}, which it was made from"
    assert set(delete.split()) <= {path.removeprefix("run/") for path in paths.split()}
    for path in paths.split():
        run.remove(path)
    call(mt, *words(rounds=2))
    assert files(copy) == files(undisturbed)
    assert all(same_weights(copy / name, undisturbed / name) for name in ("policy", "rm"))


def test_a_damaged_note_is_a_problem(call, words, copy):
    for text in ("{", "[]", '{"settings": []}', '{"settings": {}, "sources": 5}'):
        (copy / "run.json").write_text(text)
        with pytest.raises(Problem, match="run.json is damaged"):
            call(mt, *words(rounds=2))


# ---------------------------------------------------------------- steps that can be replaced
def test_a_judge_scores_in_the_place_of_the_reward_model(words, here, prompts):
    o = run.parse(mt.Options, words(select_prompts=0))
    manifest.claim(o.out, o)
    subset = mt.split(o)[0]

    def judge(rm, samples, path, score_batch):
        run.write_rows(path, [row | {"score": float(row["tokens"]), "rm": "length"} for row in samples])
    out = Path("run")
    run.write_rows(out / "prompts" / "select.jsonl", [{"prompt": prompts[0]}])
    mt.e_step(o, o.policy, o.rm, subset, out / "e", judge)
    mt.m_step(o, o.policy, o.policy, o.rm, subset, out / "m", out / "e" / "pairs.jsonl", judge)
    for name in ("e/samples", "e/select/before", "m/new", "m/old"):
        rows = read_jsonl(here / f"{name}.jsonl")
        assert rows and all(row["score"] == row["tokens"] and row["rm"] == "length" for row in rows)


def test_a_prompt_may_give_several_pairs(call, words, here, monkeypatch):
    single, given = filter_script.preference_pairs, []

    def twice(samples):
        pairs, without = single(samples)
        given.append(len(pairs))
        return [pair | {"weight": weight} for pair in pairs for weight in (1.0, 0.5)], without
    monkeypatch.setattr(filter_script, "preference_pairs", twice)
    call(mt, *words())
    for part in ("e1", "e2"):
        assert len(read_jsonl(here / "round1" / part / "pairs.jsonl")) == 2 * given[part == "e2"]
    pairs = read_jsonl(here / "round1" / "e1" / "pairs.jsonl")
    mixed = read_jsonl(here / "round1" / "m" / "preferences.jsonl")
    assert [row.get("weight") for row in mixed if row["source"].endswith("pairs.jsonl")] == [
        pair["weight"] for pair in pairs]
    page = (here / "report.html").read_text()
    assert f"{given[0]} of 8 prompts gave a pair" in page and page.count(f"{pairs[0]['reason']}; ") >= 1


def test_the_default_run_folder_is_named_after_the_script(words, monkeypatch):
    class Claimed(Exception):
        pass

    def claim(out, *_, **__):
        raise Claimed(out)
    monkeypatch.setattr(manifest, "claim", claim)
    monkeypatch.setattr(mt.toy, "build", lambda _: dict(policy=fixed[1], rm=fixed[3], prompts=fixed[5]))
    fixed = words()
    for name, flags, out in (("mt.py", fixed[:6], "runs/mt"), ("mt.py", [], "runs/toy"),
                             ("mine.py", fixed[:6], "runs/mine"), ("mine.py", [], "runs/mine")):
        monkeypatch.setattr("sys.argv", [name, *flags])
        with pytest.raises(Claimed, match=out):
            mt.main()


# ---------------------------------------------------------------- the real command line
def test_two_processes_make_the_same_first_samples_and_pairs_as_one(script, words, undisturbed, tmp_path):
    done = script("mt.py", *words(), processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("samples", "pairs"):
        file = Path("round1") / "e1" / f"{name}.jsonl"
        assert (tmp_path / "run" / file).read_bytes() == (undisturbed / file).read_bytes()
    for name in ("policy", "rm"):
        assert weights_of(tmp_path / "run" / name).keys() == weights_of(undisturbed / name).keys()
    assert done.stdout.count("30 prompts (1 repeated ones left out)") == 1  # only rank 0 speaks


@pytest.mark.parametrize("changes, message", [
    (dict(rm="nowhere"), "mt.py: nowhere: no such folder"),
    (dict(select_prompts=29), "30 different prompts"),
])
def test_bad_input_is_one_line_and_exit_code_2(script, words, tmp_path, changes, message):
    done = script("mt.py", *words(**changes), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_problem_in_two_processes_ends_them_both(script, words, tmp_path):
    done = script("mt.py", *words(rm="nowhere"), processes=2, cwd=tmp_path)
    assert done.returncode != 0
    assert "mt.py: nowhere: no such folder" in done.stderr


def test_a_policy_needs_a_reward_model_and_prompts(call, here):
    with pytest.raises(Problem, match="--policy, --rm and --prompts go together"):
        call(mt, "--policy", "somewhere", "--out", here)


def test_a_reward_model_and_prompts_need_a_policy(call, words, here):
    with pytest.raises(Problem, match="--policy, --rm and --prompts go together"):
        call(mt, *words()[2:], "--out", here)
    assert not here.exists()


def test_what_can_be_refused_is_refused_before_anything_is_done(call, words, here, tiny, written, prompts):
    for changes, message in [
            (dict(rm=tiny()), "has no reward head"), (dict(select_prompts=0), "needs --select false"),
            (dict(prompts=written("long.jsonl", [{"prompt": p} for p in [*prompts, "sad " * 200]])),
             "prompt of 2.. tokens does not fit into the context")]:
        with pytest.raises(Problem, match=message):
            call(mt, *words(**changes))
        assert not (here / "prompts").exists()


@pytest.mark.parametrize("name, value", [("samples", 0), ("max_new_tokens", 0), ("rounds", 0), ("top_p", 0),
                                         ("micro_batch", 0), ("policy_batch", 0), ("temperature", -1)])
def test_a_number_that_makes_no_sense_is_a_problem_before_anything_is_written(call, words, here, name, value):
    with pytest.raises(Problem, match=f"--{name} "):
        call(mt, *words(**{name: value}))
    assert not here.exists()


def test_the_phases_run_alone_from_file_to_file(call, tiny, written, prompts, here):
    path, rm = written("prompts.jsonl", [{"prompt": p} for p in prompts]), tiny(reward=True)
    call(sampler, "--model", tiny(), "--prompts", path, "--out", "samples.jsonl", "--max_new_tokens", 8)
    call(reward, "--model", rm, "--samples", "samples.jsonl", "--out", "scored.jsonl")
    call(filter_script, "--samples", "scored.jsonl", "--out", "pairs.jsonl")
    call(mt.dpo, "--model", tiny(), "--pairs", "pairs.jsonl", "--out", "policy", "--lr", 1e-3, "--batch", 8)
    call(reward, "--model", rm, "--pairs", "pairs.jsonl", "--out", "rm", "--lr", 1e-3, "--batch", 8)
    assert read_jsonl("pairs.jsonl") == filter_script.preference_pairs(read_jsonl("scored.jsonl"))[0]
    assert not same_weights("policy", tiny()) and not same_weights("rm", rm)

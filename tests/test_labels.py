"""pytest tests/test_labels.py

Labels from outside: which are asked for, how they are given, what they do to the M-step.
"""
import json
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import mt
import reward
from common import labels
from common.data import read_jsonl, write_jsonl
from common.parallel import Problem
from evals import figures, gold

SECOND_IS_BETTER = """
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
open(sys.argv[1], "w").writelines(json.dumps(row | {"chosen": 1}) + "\\n" for row in rows)
open("asked", "a").write(sys.argv[1] + "\\n")
"""


@pytest.fixture
def o(tmp_path):
    """Options of a run in the folder `run`."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"settings": {}}')
    return mt.Options(out=str(tmp_path / "run"))


def scored(prompt, *scores, texts="abcdef"):
    return [dict(prompt=prompt, index=i, response=text, score=score)
            for i, (text, score) in enumerate(zip(texts, scores))]


def test_the_closest_rewards_of_unlike_answers_are_asked_about():
    samples = [*scored("wide", 9.0, 0.0), *scored("close", 5.0, 1.0, 5.5), *scored("closer", 2.0, 2.2),
               *scored("same text", 1.0, 1.0, texts="aa")]
    assert labels.unsure(samples, 2) == [("close", ["a", "c"]), ("closer", ["a", "b"])]
    assert labels.unsure(samples, 9) == [("wide", ["a", "b"]), *labels.unsure(samples, 2)]


def test_without_a_labeller_the_run_stops_until_the_file_is_filled_in(o, tmp_path):
    path, questions = tmp_path / "run" / "labels.jsonl", [("p", ["a", "b"]), ("q", ["c", "d"])]
    for given in (None, "1", 2, True, 1.0):
        with pytest.raises(Problem, match="labels.jsonl: [12] pairs wait for a label; write 0 or 1 as"):
            labels.ask(o, path, questions)
        first, second = read_jsonl(path)
        write_jsonl(path, [first | {"chosen": given}, second | {"chosen": 0}])
    write_jsonl(path, [row | {"chosen": 1} for row in read_jsonl(path)])
    assert [row["chosen"] for row in labels.ask(o, path, questions)] == [1, 1]
    write_jsonl(path, [row | {"chosen": 0} for row in read_jsonl(path)])
    with pytest.raises(Problem, match="is not what was written"):
        labels.ask(o, path, questions)


def test_nothing_but_the_label_may_change(o, tmp_path):
    path = tmp_path / "run" / "labels.jsonl"
    write_jsonl(path, [dict(prompt="p", answers=["b", "a"], chosen=1)])
    with pytest.raises(Problem, match="only `chosen` may be changed"):
        labels.ask(o, path, [("p", ["a", "b"])])
    path.write_text("1\n")
    o.labeller = "true"
    with pytest.raises(Problem, match="labels.jsonl:1: a JSON object is needed"):
        labels.ask(o, path, [("p", ["a", "b"])])


def test_a_labeller_that_fails_is_one_line(o, tmp_path):
    o.labeller = f"{shlex.quote(sys.executable)} -c exit(3)"
    with pytest.raises(Problem, match=r"--labeller .*labels.jsonl: exit code 3"):
        labels.ask(o, tmp_path / "run" / "labels.jsonl", [("p", ["a", "b"])])


def test_labels_of_all_rounds_and_as_many_anchors_as_other_pairs_join(o, written):
    o.anchor = written("anchor.jsonl", [dict(prompt="x", chosen=str(i), rejected="no") for i in range(50)])
    for number, chosen in ((1, 0), (2, 1)):
        write_jsonl(f"{o.out}/round{number}/m/labels.jsonl",
                    [dict(prompt=f"p{number}", answers=["a", "b"], chosen=chosen)])
    path = labels.Path(o.out) / "round2" / "m" / "preferences.jsonl"
    rows = labels.more(o, 5, path)
    assert [(row["prompt"], row["chosen"], row["rejected"], row["weight"]) for row in rows[:2]] == [
        ("p1", "a", "b", labels.WEIGHT), ("p2", "b", "a", labels.WEIGHT)]
    assert len({row["chosen"] for row in rows[2:]}) == 7 == len(rows[2:]) and rows == labels.more(o, 5, path)


@pytest.mark.parametrize("better, share", [("new", 1.0), ("old", 0.0)])
def test_the_spot_check_is_blind_and_counts_for_the_new_policy(o, monkeypatch, written, better, share):
    def ask(o, path, questions, *made_from):
        assert all(int(prompt) % 2 == 0 for prompt, answers in questions)  # the others were not kept
        places.extend(answers.index(f"new{prompt}") for prompt, answers in questions)
        return [dict(chosen=answers.index(f"{better}{prompt}")) for prompt, answers in questions]

    places, o.spot_check = [], 40
    comparisons = written("comparisons.jsonl", [
        dict(prompt=str(i), new=f"new{i}", old=f"old{i}", kept=i % 2 == 0) for i in range(100)])
    monkeypatch.setattr(labels, "ask", ask)
    path = labels.Path(o.out) / "round1" / "m" / "spot_check.jsonl"
    write_jsonl(path, [])
    assert labels.favours_new(o, comparisons, path) is (share >= 0.5)
    assert len(places) == 40 and 8 < sum(places) < 32
    assert labels.refused(path.parent) == (None if share >= 0.5 else "spot_check")
    for file in (path, path.with_suffix(".json")):
        file.unlink()
    labels.manifest.due(o.out, path)
    write_jsonl(path, [])  # labelled anew, which the verdict's leftovers don't take away
    assert labels.favours_new(o, comparisons, path) is (share >= 0.5) and path.exists()
    none_kept = written("dropped.jsonl", [dict(prompt="1", new="n", old="o", kept=False)])
    assert labels.favours_new(o, none_kept, path)


@pytest.mark.parametrize("mended, broken, passed", [
    (0, 0, False), (6, 0, True),     # 0.06 above, ± 1.645 × 0.0239
    (3, 1, False), (12, 4, True), (12, 6, False), (0, 9, False)])
def test_the_gate_asks_for_more_than_chance(o, monkeypatch, written, mended, broken, passed):
    before = np.arange(100) < 50
    after = before.copy()
    after[50:50 + mended], after[:broken] = True, False
    monkeypatch.setattr(reward, "readable", lambda folder, pairs, longest: pairs)
    monkeypatch.setattr(reward, "ordered", lambda folder, *_: (before if folder == "old" else after).tolist())
    o.gate = written("gate.jsonl", [dict(prompt="x", chosen="a", rejected="b")] * 100)
    path = labels.Path(o.out) / "gate.json"
    assert labels.gated(o, "old", "new", path) == ("new" if passed else "old")
    difference = after.astype(int) - before
    bound = difference.mean() - 1.645 * np.sqrt(difference.var(ddof=1) / 100)
    assert json.loads(path.read_text())["bound"] == pytest.approx(bound) and (bound > 0) is np.bool_(passed)


@pytest.mark.parametrize("flag", ["--anchor", "--gate"])
def test_files_are_checked_before_anything_is_computed(call, tiny, written, flag):
    bad = written("bad.jsonl", [dict(prompt="x")])
    with pytest.raises(Problem, match="bad.jsonl:1: no answer in `chosen`"):
        call(mt, "--policy", tiny(), "--rm", tiny(reward=True), "--prompts", bad, flag, bad)
    for words, said in (("--labeller x", "--labeller needs .*--spot_check"),
                        ("--spot_check_stops true", "--spot_check_stops needs --spot_check"),
                        ("--labels 9 --labeller 'x", "--labeller 'x: No closing quotation"),
                        ("--labels 9 --update_rm false", "--labels.* need the M-step")):
        with pytest.raises(Problem, match=said):
            call(mt, "--policy", tiny(), "--rm", tiny(reward=True), "--prompts", bad, *words.split())


@pytest.fixture
def run_tiny(call, tiny, written, prompts, pairs, tmp_path, monkeypatch):
    """run_tiny(flags) -> the folder of a tiny run of mt.py."""
    def start(*flags):
        monkeypatch.chdir(tmp_path)
        labeller, held = written("label.py", []), written("held.jsonl", pairs[:12])
        labels.Path(labeller).write_text(SECOND_IS_BETTER)
        call(mt, "--policy", tiny(), "--rm", tiny(reward=True), "--prompts",
             written("prompts.jsonl", [{"prompt": p} for p in prompts]), "--out", "run", "--samples", 4,
             "--max_new_tokens", 10, "--max_length", 64, "--policy_batch", 8, "--rm_batch", 8,
             "--select_prompts", 6, "--tau", 0, *(flag.format(held=held, label=f"{sys.executable} {labeller}")
                                                 for flag in flags))
        return tmp_path / "run"
    return start


def test_labels_and_anchors_train_the_reward_model_and_are_asked_for_once(run_tiny, tmp_path):
    flags = ["--labels", "3", "--anchor", "{held}", "--labeller", "{label}"]
    folder = run_tiny(*flags) / "round1" / "m"
    asked, rows = read_jsonl(folder / "labels.jsonl"), read_jsonl(folder / "preferences.jsonl")
    assert len(asked) == 3 and all(row["chosen"] == 1 for row in asked)
    taken = [row for row in rows if row["source"].endswith("labels.jsonl")]
    assert [[row["rejected"], row["chosen"]] for row in taken] == [row["answers"] for row in asked]
    assert sum(row["source"].endswith("held.jsonl") for row in rows) == 12  # no more are there
    run_tiny(*flags)
    assert (tmp_path / "asked").read_text().count("\n") == 1


def test_a_refused_reward_model_is_not_used_and_the_report_says_so(run_tiny):
    folder = run_tiny("--gate", "{held}")  # of 12 pairs, with a learning rate of 2e-6
    assert (folder / "rm").resolve() != (folder / "round1" / "m" / "rm").resolve()
    assert all("round1" not in row["rm"] for row in read_jsonl(folder / "round1" / "e2" / "samples.jsonl"))
    steps = figures.load(folder)["steps"]
    assert [step["rm"] for step in steps] == [0, 0, 0] and "refused by --gate" in figures.steps_table(steps)
    states = gold.states_of(folder, SimpleNamespace(policy="p", rm="base", rounds=1))
    assert states[-1][2] == "base"


def favour_old(o, path, questions, *_):
    write_jsonl(path, [])
    return [dict(chosen=-1)] * len(questions)


def test_a_spot_check_that_favours_the_old_policy_leaves_the_m_step_out(run_tiny, monkeypatch):
    monkeypatch.setattr(labels, "ask", favour_old)
    folder = run_tiny("--spot_check", "5")
    assert not (folder / "round1" / "m" / "rm").exists() and (folder / "round1" / "e2" / "policy").exists()
    assert "refused by --spot_check" in figures.steps_table(figures.load(folder)["steps"])


def test_a_spot_check_that_waits_for_labels_has_refused_nothing(run_tiny, tmp_path):
    with pytest.raises(Problem, match="5 pairs wait for a label"):
        run_tiny("--spot_check", "5")
    assert [step["kind"] for step in figures.load(tmp_path / "run")["steps"]] == ["E"]


def test_a_spot_check_stops_the_run_where_that_is_asked_for(run_tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(labels, "ask", favour_old)
    with pytest.raises(Problem, match="spot check: 0.000 of 5 .*the run stops, and run/policy is still the"):
        run_tiny("--spot_check", "5", "--spot_check_stops", "true")
    folder = tmp_path / "run"
    assert (folder / "round1" / "e1" / "policy").exists() and not (folder / "round1" / "e2").exists()
    assert (folder / "policy").resolve() != (folder / "round1" / "e1" / "policy").resolve()

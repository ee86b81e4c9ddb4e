"""pytest tests/test_human_labels.py

Human labels in the M-step (variants/human_labels.py): which are asked for, how they are given, and what they
decide.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import run
from common.data import read_json, read_jsonl, write_jsonl
from common.parallel import Problem
from evals import gold
from variants import human_labels

# A labeller that prefers the answers of the policy it is told, "new" or "old". It finds the old policy's
# answers in old.jsonl beside the file, and notes in `asked` which files it was given.
LABELLER = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[-1])
pathlib.Path(__file__).with_name("asked").open("a").write(path.name + " ")
old = {json.loads(line)["response"] for line in open(path.with_name("old.jsonl"))}
rows = [json.loads(line) for line in open(path)]
for row in rows:
    row["chosen"] = int((row["answers"][1] in old) == (sys.argv[1] == "old"))
path.write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""

@pytest.fixture
def o(tmp_path):
    options = human_labels.Options(out=str(tmp_path / "run"))
    run.claim(options.out, options)
    return options

def test_the_run_stops_until_every_pair_has_a_label_and_nothing_else_has_changed(o):
    path, todo = (Path(o.out) / f"{name}.jsonl" for name in ("labels", "labels.todo"))
    questions = [dict(prompt="p", answers=["a", "b"], new=1), dict(prompt="q", answers=["c", "d"], new=0)]
    for given in (None, "1", 2, True, 1.0):
        with pytest.raises(Problem, match="labels.todo.jsonl: [12] labels missing; set `chosen`"):
            human_labels.ask_for_labels(o, questions, path)
        first, second = read_jsonl(todo)
        assert "new" not in first
        write_jsonl(todo, [first | {"chosen": given}, second | {"chosen": 0}])
    write_jsonl(todo, [first | {"chosen": 1, "answers": ["b", "a"]}, second | {"chosen": 0}])
    with pytest.raises(Problem, match="only `chosen` may be changed"):
        human_labels.ask_for_labels(o, questions, path)
    write_jsonl(todo, [first | {"chosen": 1}, second | {"chosen": 0}])
    human_labels.ask_for_labels(o, questions, path)
    assert [row["chosen"] for row in read_jsonl(path)] == [1, 0] and not todo.exists()

@pytest.fixture
def asked(monkeypatch):
    """The questions that are asked. Nobody answers them."""
    found = []
    monkeypatch.setattr(human_labels, "ask_for_labels", lambda o, questions, path: found.extend(questions))
    return found

def test_labels_are_asked_for_pairs_of_different_answers_with_the_closest_rewards(o, written, asked):
    scores, o.labels = {"wide": (9.0, 0.0), "close": (5.0, 5.5), "same": (1.0, 1.0), "closer": (2.0, 2.2)}, 2
    own = written("own.jsonl", [dict(prompt=prompt, response="a" if prompt == "same" else str(i), score=score)
                                for prompt, two in scores.items() for i, score in enumerate(two)])
    human_labels.label_closest_pairs.__wrapped__(o, own, Path(o.out) / "labels.jsonl")
    assert asked == [dict(prompt="close", answers=["0", "1"]), dict(prompt="closer", answers=["0", "1"])]

def test_the_spot_check_asks_about_kept_comparisons_and_draws_the_place_of_the_new_answer(o, written, asked):
    rows, o.spot_check = [dict(prompt="p", new=f"new{i}", old="o", kept=i % 2 == 0) for i in range(100)], 40
    human_labels.spot_check.__wrapped__(o, written("rows.jsonl", rows), Path(o.out) / "spot_check.jsonl")
    assert [row["answers"][row["new"]] for row in asked] == [f"new{i}" for i in range(0, 80, 2)]
    assert 8 < sum(row["new"] for row in asked) < 32

@pytest.mark.parametrize("mended, broken, passed", [
    (0, 0, False), (6, 0, True),     # a gain of 0.06, and 1.645 standard errors of 0.0239 each
    (3, 1, False), (12, 4, True), (12, 6, False), (0, 9, False)])
def test_a_reward_model_passes_the_gate_only_if_its_gain_is_more_than_chance(
        o, monkeypatch, written, mended, broken, passed):
    old = np.arange(100) < 50
    new = old.copy()
    new[50:50 + mended], new[:broken] = True, False
    monkeypatch.setattr(human_labels, "judge_pairs",
                        lambda folder, pairs, *_: (pairs, {"new": new, "old": old}[folder.name]))
    o.gate = str(written("gate.jsonl", [dict(prompt="x", chosen="a", rejected="b")] * 100))
    found = read_json(human_labels.gate(o, "old", "new", Path(o.out) / "gate.json"))
    difference = new * 1 - old
    assert found["bound"] == pytest.approx(difference.mean() - 1.645 * np.sqrt(difference.var(ddof=1) / 100))
    assert found["passed"] is passed

@pytest.fixture
def label_run(variant, written, prompts, tmp_path):
    """label_run("new", flags) -> the folder of a tiny run whose labeller favours that policy, "new" or "old".
    "held" among the flags stands for a file of labelled pairs."""
    (tmp_path / "label.py").write_text(LABELLER)
    held = written("held.jsonl", [dict(prompt=p, chosen="the end .", rejected="waves .") for p in prompts])
    return lambda favoured, *flags: variant(
        "human_labels", *(held if flag == "held" else flag for flag in flags),
        "--labeller", f"{sys.executable} {tmp_path / 'label.py'} {favoured}")

def rm_after(out):
    """The reward model after the last round, as evals/gold.py finds it, which knows nothing of labels."""
    return gold.states_of(out, SimpleNamespace(policy="base", rm="base", rounds=1))[-1][2]

def test_labels_are_asked_for_once_and_train_the_reward_model_and_so_do_as_many_anchors(label_run, tmp_path):
    flags = ["--labels", 3, "--anchor", "held", "--spot_check", 4, "--gate", "held", "--rm_lr", 3e-3]
    out = label_run("new", *flags)
    step = out / "round1" / "m"
    given, mixed, rows = (read_jsonl(step / f"{name}.jsonl") for name in ("labels", "mixed", "preferences"))
    labelled, anchors = rows[len(mixed):len(mixed) + 3], rows[len(mixed) + 3:]
    assert rows[:len(mixed)] == mixed and len(given) == 3
    assert [[row["rejected"], row["chosen"]] for row in labelled] == [
        row["answers"][::2 * row["chosen"] - 1] for row in given]
    assert len(anchors) == len({row["prompt"] for row in anchors}) == len(mixed) + 3
    assert {row["source"] for row in anchors} == {str(tmp_path / "held.jsonl")}
    assert (out / "rm").resolve() == step / "rm_candidate" and rm_after(out) == str(step / "rm")
    assert all("rm_candidate" in row["rm"] for row in read_jsonl(out / "round1" / "e2" / "samples.jsonl"))
    label_run("new", *flags)
    assert (tmp_path / "asked").read_text().split() == ["spot_check.todo.jsonl", "labels.todo.jsonl"]

def test_a_reward_model_that_the_gate_refuses_is_not_used(label_run):
    out = label_run("new", "--gate", "held")  # at the default learning rate of 2e-6 it gains nothing
    assert (out / "round1" / "m" / "rm_candidate").exists() and rm_after(out) == "base"
    assert out not in (out / "rm").resolve().parents
    assert all("round1" not in row["rm"] for row in read_jsonl(out / "round1" / "e2" / "samples.jsonl"))

def test_a_spot_check_that_favours_the_old_policy_skips_the_m_step_or_stops_the_run(label_run, capfd):
    out = label_run("old", "--spot_check", 5)
    assert not (out / "round1" / "m" / "preferences.jsonl").exists() and rm_after(out) == "base"
    assert (out / "policy").resolve() == out / "round1" / "e2" / "policy"
    with pytest.raises(AssertionError, match=r"\[2\]"):
        label_run("old", "--spot_check", 5, "--spot_check_stops", "--overwrite")
    assert "spot_check.jsonl favours the old policy; the run stops" in capfd.readouterr().err
    assert (out / "round1" / "e1" / "policy").exists() and not (out / "round1" / "e2").exists()
    assert out not in (out / "policy").resolve().parents

"""Measures whether a run's policies get better, by a judge that stays the same in all rounds. The result has
a line for the base policy and one for the policy after each round; `by_base` also has one after an E-step
within a round.

`measure` is for the embedded task, and writes gold.jsonl. The judge is gold, a function that knows the task's
rules and says how well an answer does what its prompt asks (common/toy.py: gold). The base reward model
learnt from noisy labels of its form. Nothing else in mt.py trains on it or sees the test prompts. Two answers
are drawn for each test prompt, and a policy's gold is the mean over both answers and all prompts.

`by_base` is for other runs, and writes base.jsonl. The judge is the base reward model, which compares each
policy's answers to the prompts of model selection (D_MS) with those of the base policy. This is the reward
model that the first round optimises, so a gain still has to be confirmed by a benchmark or by people.
"""
from pathlib import Path

import numpy as np

import reward
from common import run, toy
from common.data import read_json, read_jsonl
from common.run import phase
from common.toy import gold_of, parts
from evals.stats import ordered_alike, standard_error
from filter import win_rate

def by_base(o):
    """Write base.jsonl into the run folder. Without model selection there are no answers, and no file."""
    out, lines, base = Path(o.out), [], None
    for label, policy, _ in states_of(out, o, True) if o.select and o.select_prompts > 1 else []:
        step, name = out / "round1" / "e1", "before"
        if policy != o.policy:
            step = Path(policy).parent
            name = read_json(step / "selection.json")["chosen"]
        rows = read_jsonl(score_again(o, step / "select" / f"{name}.jsonl", o.rm,
                                      out / "judged" / f"{label.replace(' ', '')}.jsonl"))
        base = base or rows
        scores, base_scores = ([row["score"] for row in some] for some in (rows, base))
        lines.append(dict(policy=label, n=len(rows), win_rate=win_rate(scores, base_scores), **average(rows)))
    if lines:
        run.write_rows(out / "base.jsonl", lines)

def average(rows, per_prompt=1):
    """Return what gold.jsonl and base.jsonl have in common: means over a policy's answers, which the base RM
    has scored."""
    scores = np.reshape([row["score"] for row in rows], (-1, per_prompt)).mean(1)
    return dict(reward_r0=float(scores.mean()), reward_r0_se=standard_error(scores),
                **{key: float(np.mean([row[key] for row in rows])) for key in ("tokens", "finished")})

@phase
def score_again(o, answers, rm, path):
    """Score a file's answers with another reward model."""
    reward.score(rm, read_jsonl(answers), path, o.score_batch)

@phase
def test_answers(o, policy, path, label):
    """Sample two answers to each test prompt, and score them with the base RM."""
    reward.sample_and_score(o, policy, o.rm, parts(o.seed)["test"], 2, f"{o.seed}/test/{label}", path)

def measure(o):
    """Write gold.jsonl into the run folder. For the win rate, a policy's first answer to a prompt is compared
    with the base policy's first answer, and the second with the second."""
    out, lines, base = Path(o.out), [], None
    states = states_of(out, o)
    for label, policy, rm in states:
        if lines and (policy, rm) == states[len(lines) - 1][1:]:
            lines.append({**lines[-1], "policy": label})  # the run had stopped
            continue
        folder = out / "test" / label.replace(" ", "")
        own = test_answers(o, policy, folder / "r0.jsonl", label=label)
        base = base or own
        rows, base_rows = read_jsonl(own), read_jsonl(base)
        on_own, on_base = (read_jsonl(score_again(o, answers, rm, folder / name))
                           for answers, name in ((own, "own.jsonl"), (base, "base.jsonl")))
        judged, base_judged = (np.reshape([toy.parts_of_gold(row) for row in some], (-1, 2, 2))
                               for some in (rows, base_rows))  # (prompts, answers, form and content)
        values, base_values = judged.sum(2), base_judged.sum(2)
        lines.append(dict(
            policy=label, rm=Path(rm).parts[-3] if rm != o.rm else "r0", gold=float(values.mean()),
            gold_se=standard_error(values.mean(1)), n=len(values),
            **dict(zip(("form", "content"), judged.mean((0, 1)).tolist())),
            win_rate=win_rate(values, base_values),
            **average(rows, 2), accuracy_base=agreement_with_gold(on_base),
            accuracy_current=agreement_with_gold(on_own), length_slope=length_slope(on_base),
            comparisons_right=right_comparisons(out / label.replace(" ", "") / "m" / "comparisons.jsonl")))
    run.write_rows(out / "gold.jsonl", lines)

def states_of(out, o, within=False):
    """Return [(label, policy, RM)] of the base models and after each round. Models are given as folders.
    within: also after the first E-step of each round that has two."""
    states, policy, rm = [("base", o.policy, o.rm)], o.policy, o.rm
    for number in range(1, o.rounds + 1):
        for step, kind in (("e1", "policy"), ("m", "rm"), ("e2", "policy")):
            folder = out / f"round{number}" / step
            if run.exists(folder / kind):
                made = str(folder / kind)
                if within and step == "e2":
                    states.append((f"round {number} e1", policy, rm))
                policy, rm = (made, rm) if kind == "policy" else (policy, made)
        states.append((f"round {number}", policy, rm))
    return states

def agreement_with_gold(rows):
    """Return how often an RM orders the two answers to a prompt as gold does, where gold has a preference."""
    pairs = list(zip(rows[::2], rows[1::2]))
    return ordered_alike([[row["score"] for row in pair] for pair in pairs],
                         [[gold_of(row) for row in pair] for pair in pairs])

def right_comparisons(path):
    """Return how often gold prefers the new answer in an M-step's kept comparisons, where it has a
    preference. None if there was no M-step, or there is nothing to count."""
    rows = [row for row in read_jsonl(path) if row["kept"]] if path.exists() else []
    new, old = ([toy.gold(row["prompt"], row[side], row[f"{side}_finished"]) for row in rows]
                for side in ("new", "old"))
    better = [a > b for a, b in zip(new, old) if a != b]
    return float(np.mean(better)) if better else None

def length_slope(rows):
    """Return the slope of reward over length between the two answers to a prompt, in standard deviations of
    the reward per ten tokens."""
    rewards = np.diff(np.reshape([row["score"] for row in rows], (-1, 2)))
    tokens = np.diff(np.reshape([row["tokens"] for row in rows], (-1, 2)))
    return float((rewards * tokens).sum() / (tokens**2).sum() * 10 / np.std([row["score"] for row in rows]))

"""Whether a run's policies get better, by a judge who stays the same: a line for the base and each round.

measure: of the embedded task, by gold, on test prompts that nothing else has seen: gold.jsonl.
by_base: of other runs, by the base RM against the base's answers, on the prompts of D_MS: base.jsonl. It is
the RM that the first round optimises, so a gain there is still to be shown by a benchmark or by people.
"""
from pathlib import Path

import numpy as np

import reward
from common import run
from common.data import read_json, read_jsonl
from common.run import phase
from common.toy import gold_of, parts
from evals.stats import ordered_alike, standard_error
from filter import win_rate

def by_base(o):
    """base.jsonl in the run folder; without model selection there are no answers to judge, and no file."""
    out, lines, base = Path(o.out), [], None
    for label, policy, _ in states_of(out, o) if o.select and o.select_prompts > 1 else []:
        step, name = out / "round1" / "e1", "before"
        if policy != o.policy:
            step = Path(policy).parent
            name = read_json(step / "selection.json")["chosen"]
        rows = read_jsonl(score_again(o, step / "select" / f"{name}.jsonl", o.rm,
                                      out / "judged" / f"{label.replace(' ', '')}.jsonl"))
        base = base or rows
        scores, base_scores = ([row["score"] for row in some] for some in (rows, base))
        lines.append(dict(policy=label, n=len(rows), win_rate=win_rate(scores, base_scores), **shared(rows)))
    if lines:
        run.write_rows(out / "base.jsonl", lines)

def shared(rows, per_prompt=1):
    """What both files say of a policy's answers, scored by the base RM."""
    scores = np.reshape([row["score"] for row in rows], (-1, per_prompt)).mean(1)
    return dict(reward_r0=float(scores.mean()), reward_r0_se=standard_error(scores),
                **{key: float(np.mean([row[key] for row in rows])) for key in ("tokens", "finished")})

@phase
def score_again(o, answers, rm, path):
    """Answers that are there, scored by another reward model."""
    reward.score(rm, read_jsonl(answers), path, o.score_batch)

@phase
def test_answers(o, policy, path, label):
    """Two answers to each test prompt, scored by the base RM."""
    reward.sample_and_score(o, policy, o.rm, parts(o.seed)["test"], 2, f"{o.seed}/test/{label}", path)

def measure(o):
    """gold.jsonl in the run folder."""
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
        values, base_values = (np.reshape([gold_of(row) for row in some], (-1, 2))  # (prompts, answers)
                               for some in (rows, base_rows))
        lines.append(dict(
            policy=label, rm=Path(rm).parts[-3] if rm != o.rm else "r0", gold=float(values.mean()),
            gold_se=standard_error(values.mean(1)), n=len(values), win_rate=win_rate(values, base_values),
            **shared(rows, 2), accuracy_base=agreement_with_gold(on_base),
            accuracy_current=agreement_with_gold(on_own), length_slope=length_slope(on_base)))
    run.write_rows(out / "gold.jsonl", lines)

def states_of(out, o):
    """[(label, policy, RM)] of the base models and after each round: folders."""
    states, policy, rm = [("base", o.policy, o.rm)], o.policy, o.rm
    for number in range(1, o.rounds + 1):
        for step, kind in (("e1", "policy"), ("m", "rm"), ("e2", "policy")):
            folder = out / f"round{number}" / step
            if run.exists(folder / kind):
                made = str(folder / kind)
                policy, rm = (made, rm) if kind == "policy" else (policy, made)
        states.append((f"round {number}", policy, rm))
    return states

def agreement_with_gold(rows):
    """How often an RM orders two answers to a prompt as gold does, where gold has a preference."""
    pairs = list(zip(rows[::2], rows[1::2]))
    return ordered_alike([[row["score"] for row in pair] for pair in pairs],
                         [[gold_of(row) for row in pair] for pair in pairs])

def length_slope(rows):
    """Within a prompt, how much reward (in its standard deviations) goes with ten more tokens."""
    rewards = np.diff(np.reshape([row["score"] for row in rows], (-1, 2)))
    tokens = np.diff(np.reshape([row["tokens"] for row in rows], (-1, 2)))
    return float((rewards * tokens).sum() / (tokens**2).sum() * 10 / np.std([row["score"] for row in rows]))

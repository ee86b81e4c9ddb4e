"""Whether a run's policies get better, by a judge who stays the same: a line for the base and each round.

measure: of the embedded task, by gold, on test prompts that nothing else has seen: gold.jsonl.
by_base: of other runs, by the base RM against the base's answers, on the prompts of D_MS: base.jsonl. It is
the RM that the first round optimises, so a gain there is still to be shown by a benchmark or by people.
"""
from pathlib import Path

import numpy as np

import labels
import manifest
import reward
import run
from data import read_jsonl, read_selection
from evals.stats import ordered_alike, standard_error
from filter import win_rate
from parallel import from_rank0, rank
from rollout import sample_and_score
from toy import gold_of, parts


def by_base(o):
    """base.jsonl in the run folder; without model selection there are no answers to judge, and no file."""
    out, lines, base = Path(o.out), [], None
    for label, policy, _ in states_of(out, o) if o.select and o.select_prompts > 1 else []:
        step, name = out / "round1" / "e1", "before"
        if policy != o.policy:
            step = Path(policy).parent
            name = read_selection(step / "selection.json")["chosen"]
        answers, path = step / "select" / f"{name}.jsonl", out / "judged" / f"{label.replace(' ', '')}.jsonl"
        if not from_rank0(rank() == 0 and path.exists() and texts(path) == texts(answers)):  # or made again
            run.remove_all(path, run.parts_of(path))
            reward.score(o.rm, read_jsonl(answers), path, o.score_batch)
        run.remove_all(run.parts_of(path))
        rows = read_jsonl(path)
        base = base or rows
        scores, base_scores = ([row["score"] for row in some] for some in (rows, base))
        lines.append(dict(policy=label, n=len(rows), win_rate=win_rate(scores, base_scores), **common(rows)))
    if lines:
        run.write_rows(out / "base.jsonl", lines)


def texts(path):
    return [row["response"] for row in read_jsonl(path)]


def common(rows, per_prompt=1):
    """What both files say of a policy's answers, scored by the base RM."""
    scores = np.reshape([row["score"] for row in rows], (-1, per_prompt)).mean(1)
    return dict(reward_r0=float(scores.mean()), reward_r0_se=standard_error(scores),
                **{key: float(np.mean([row[key] for row in rows])) for key in ("tokens", "finished")})


def measure(o):
    """gold.jsonl in the run folder."""
    out = Path(o.out)
    states, lines, base = states_of(out, o), [], None
    for label, policy, rm in states:
        folder = out / "test" / label.replace(" ", "")
        if lines and (policy, rm) == states[len(lines) - 1][1:]:
            lines.append({**lines[-1], "policy": label})  # the run had stopped
            continue
        by_r0 = folder / "r0.jsonl"
        manifest.due(out, by_r0, Path(policy).parent)  # answers of an earlier policy are refused
        rows = sample_and_score(o, policy, o.rm, parts(o.seed)["test"], 2, f"{o.seed}/test/{label}", by_r0)
        manifest.done(out, by_r0)
        base = base or rows
        for path, answers in ((folder / "base.jsonl", base), (folder / "own.jsonl", rows)):
            if manifest.due(out, path, by_r0, Path(rm).parent):
                reward.score(rm, answers, path, o.score_batch)
            manifest.done(out, path)
        values, base_values = [gold_of(row) for row in rows[::2]], [gold_of(row) for row in base[::2]]
        lines.append(dict(
            policy=label, rm=Path(rm).parts[-3] if rm != o.rm else "r0", gold=float(np.mean(values)),
            gold_se=standard_error(values), n=len(values), win_rate=win_rate(values, base_values),
            **common(rows, 2),
            accuracy_base=agreement_with_gold(read_jsonl(folder / "base.jsonl")),
            accuracy_current=agreement_with_gold(read_jsonl(folder / "own.jsonl")),
            length_slope=length_slope(read_jsonl(folder / "base.jsonl"))))
    run.write_rows(out / "gold.jsonl", lines)


def states_of(out, o):
    """[(label, policy, RM)] of the base models and after each round: folders."""
    states, policy, rm = [("base", o.policy, o.rm)], o.policy, o.rm
    for number in range(1, o.rounds + 1):
        for step, kind in (("e1", "policy"), ("m", "rm"), ("e2", "policy")):
            folder = out / f"round{number}" / step
            if run.exists(folder / kind) and not (kind == "rm" and from_rank0(labels.refused(folder))):
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


def gold_table(lines):
    head = (f"{'test prompts':12} {'gold':>14} {'win vs base':>11} {'tokens':>7} {'reward r0':>9}   {'RM':6} "
            f"{'accuracy on base':>16} {'on own answers':>14} {'length slope':>12}")
    return "\n".join([head] + [
        f"{x['policy']:12} {x['gold']:6.3f} ± {x['gold_se']:.3f} {x['win_rate']:11.3f} {x['tokens']:7.1f} "
        f"{x['reward_r0']:9.3f}   {x['rm']:6} {x['accuracy_base']:16.3f} {x['accuracy_current']:14.3f} "
        f"{x['length_slope']:12.3f}" for x in lines])

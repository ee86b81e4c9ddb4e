"""Human labels in the M-step, which people have already or give while the run goes on. The paper needs none.

    torchrun -m variants.human_labels --policy … --rm … --prompts … --anchor labels.jsonl --gate others.jsonl

With --anchor and --labels the reward model also trains on labelled pairs. --spot_check decides whether there
is an M-step at all, and --gate whether its reward model comes into use.

Labels of a round are asked for in its folder m/, in spot_check.todo.jsonl and in labels.todo.jsonl. In each
row `chosen` must become 0 or 1, the place of the better one of `answers`. --labeller COMMAND is called with
the file's name to do that. Without it the run stops; label the file and give the same command again. A new
reward model is m/rm_candidate. If it passes the gate, m/rm leads to it; else the one before stays in use.
"""
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mt
from common import run
from common.data import Problem, by_prompt, read_json, read_jsonl, read_pairs, read_rows, seed_of, write_jsonl
from evals.rewardbench import judge_pairs
from evals.stats import standard_error

mutual_taught, mix_without_labels = mt.mutual_taught, mt.mix

@dataclass
class Options(mt.Options):
    anchor: str = run.option("", "labelled pairs to train the RM on, at most as many as it has other pairs")
    labels: int = run.option(None, "pairs of the new policy's answers to label in each round and train on")
    labeller: str = run.option("", "command that labels a JSONL file; none: the run stops until you have")
    spot_check: int = run.option(None, "comparisons to label; no M-step if most favour the old policy")
    spot_check_stops: bool = run.option(False, "such a spot check also ends the run, with the old policy")
    gate: str = run.option("", "labelled pairs held out; a new RM must order more of them correctly")

def mutual_taught_with_checks(o):
    if not o.update_rm or o.spot_check_stops and not o.spot_check:
        raise Problem("labels need M-steps: omit --update_rm false; --spot_check_stops needs --spot_check")
    for file in {o.anchor, o.gate} - {""}:
        read_pairs(file)  # so that a bad file is refused before the run begins
    mutual_taught(o)

def m_step(o, old_policy, new_policy, rm, prompts, folder, ranked):
    """Takes the place of mt.m_step. Returns the new reward model, or `rm` if labels speak against it."""
    if o.spot_check_stops:
        run.on_rank0(run.link, Path(o.out) / "policy", old_policy)  # it is the result if the run ends here
    new = mt.scored_samples(o, new_policy, rm, prompts, folder / "new.jsonl")
    old = mt.scored_samples(o, old_policy, rm, prompts, folder / "old.jsonl")
    comparisons = mt.make_comparisons(o, new, old, folder / "comparisons.jsonl")
    checked = o.spot_check and spot_check(o, comparisons, folder / "spot_check.jsonl")
    votes = [row["chosen"] == row["new"] for row in read_jsonl(checked)] if checked else []
    if 2 * sum(votes) < len(votes):
        if o.spot_check_stops:
            raise Problem(f"{checked} favours the old policy; the run stops, with it as {o.out}/policy")
        return rm
    if o.labels:
        own = mt.scored_samples(o, new_policy, rm, prompts, folder / "own.jsonl", samples=2)
        label_closest_pairs(o, own, folder / "labels.jsonl")
    rounds = range(1, 1 + int(folder.parent.name.removeprefix("round")))
    labels = filter(run.exists, [Path(o.out) / f"round{n}" / "m" / "labels.jsonl" for n in rounds])
    preferences = mix(o, comparisons, ranked, old_policy, *labels, folder / "preferences.jsonl")
    new_rm = mt.train_reward(o, preferences, folder / "rm_candidate")
    passed = not o.gate or read_json(gate(o, rm, new_rm, folder / "gate.json"))["passed"]
    run.on_rank0(*(run.link, folder / "rm", new_rm) if passed else (run.delete, folder / "rm"))
    mt.link_last(o)
    return new_rm if passed else rm

def ask_for_labels(o, questions, path):
    """Have each question (a row with `prompt` and two `answers`) labelled, and write all of them with their
    labels to `path`. A missing label is a Problem. For one process."""
    todo = path.with_suffix(".todo.jsonl")
    asked = [dict(prompt=row["prompt"], answers=row["answers"], chosen=None) for row in questions]
    if not todo.exists():
        write_jsonl(todo, asked)
    if o.labeller and asked:
        subprocess.run(f"{o.labeller} {shlex.quote(str(todo))}", shell=True)
    rows = [row for _, row in read_rows(todo)] if asked else []
    if [{**row, "chosen": None} for row in rows] != asked:
        raise Problem(f"{todo}: only `chosen` may be changed in this file; delete it to be asked again")
    waiting = sum(repr(row.get("chosen")) not in ("0", "1") for row in rows)
    if waiting:
        raise Problem(f"{todo}: {waiting} labels missing; set `chosen` to the better answer's place, 0 or 1")
    write_jsonl(path, [question | {"chosen": row["chosen"]} for question, row in zip(questions, rows)])
    todo.unlink()

@run.phase
def spot_check(o, comparisons, path):
    """Have the first kept comparisons labelled. A drawn order hides which answer is the new one."""
    rows = [row for row in read_jsonl(comparisons) if row["kept"]][:o.spot_check]
    places = np.random.default_rng(seed_of(o.seed, run.name_of(o, path))).integers(2, size=len(rows)).tolist()
    run.on_rank0(ask_for_labels, o, [dict(prompt=row["prompt"], new=place, answers=[
        row["old"], row["new"]][::2 * place - 1]) for row, place in zip(rows, places)], path)

@run.phase
def label_closest_pairs(o, own, path):
    """Have the pairs labelled on which the reward model is least sure: those with the closest rewards."""
    pairs = [two for two in by_prompt(read_jsonl(own)) if two[0]["response"] != two[1]["response"]]
    nearest = np.argsort([abs(a["score"] - b["score"]) for a, b in pairs], kind="stable")[:o.labels]
    run.on_rank0(ask_for_labels, o, [dict(prompt=a["prompt"], answers=[a["response"], b["response"]])
                                     for a, b in [pairs[i] for i in sorted(nearest)]], path)

@run.phase
def mix(o, comparisons, ranked, old_policy, *labels_and_path):
    """mt.mix's pairs, anchors, and the labels of all rounds, since an M-step starts from the base RM."""
    *labels, path = labels_and_path
    rows = read_jsonl(mix_without_labels(o, comparisons, ranked, old_policy, path.with_name("mixed.jsonl")))
    rows += [dict(prompt=row["prompt"], chosen=row["answers"][row["chosen"]], source=str(file),
                  rejected=row["answers"][1 - row["chosen"]]) for file in labels for row in read_jsonl(file)]
    if o.anchor:
        pool, rng = read_pairs(o.anchor), np.random.default_rng(seed_of(o.seed, "anchor", path.parts[-3]))
        rows += [pool[i] | {"source": o.anchor} for i in rng.permutation(len(pool))[:len(rows)]]
    run.write_rows(path, rows)

@run.phase
def gate(o, rm, new_rm, path):
    """Whether the new reward model orders more held-out pairs correctly, with 95% confidence: the lower bound
    of the mean difference, pair by pair, must be above 0."""
    pairs = read_pairs(o.gate)
    old, new = (1.0 * judge_pairs(each, pairs, o.score_batch, o.max_length)[1] for each in (rm, new_rm))
    bound = (new - old).mean() - 1.645 * standard_error(new - old)
    run.write_json(path, dict(before=old.mean(), after=new.mean(), bound=bound, passed=bool(bound > 0)))
    return f"accuracy on {len(new)} held-out pairs {old.mean():.3f}, of the new RM {new.mean():.3f}"

if __name__ == "__main__":
    mt.mutual_taught, mt.m_step = mutual_taught_with_checks, m_step
    run.launch(mt.main, options=Options)

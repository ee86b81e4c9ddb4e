"""News from outside, for the M-step: labels that people have, or give while a run goes on. All of it is off
unless asked for: the paper needs no labels.

--anchor FILE      labelled pairs join what the reward model trains on, up to one for each other pair
--labels N         N pairs of the new policy's own answers, on which the reward model is least sure, join, too
--spot_check N     where fewer than half of N comparisons favour the new policy, there is no M-step; with
                   --spot_check_stops true the run ends there in one line, and OUT/policy stays the old one
--gate FILE        a new reward model that doesn't order held-out labelled pairs better is dropped

--labeller COMMAND is run with the name of a JSONL file, in whose rows it writes `chosen`, 0 or 1: the better
of `answers`. Without it the run stops until somebody has done so and gives the same command again.
"""
import shlex
import subprocess
from pathlib import Path

import numpy as np

import filter
import manifest
import reward
import run
from data import Problem, by_prompt, read_json, read_jsonl, read_pairs, read_rows, seed_of
from parallel import from_rank0, rank, say

WEIGHT = 1.0  # of a pair labelled on the way, in the RM's loss


def check(o):
    """Says at once what is wrong with the flags and their files."""
    if not o.update_rm and (o.anchor or o.labels or o.spot_check or o.gate):
        raise Problem("--anchor, --labels, --spot_check and --gate need the M-step: no --update_rm false")
    for file in {o.anchor, o.gate} - {""}:
        read_pairs(file)
    try:
        shlex.split(o.labeller)
    except ValueError as error:
        raise Problem(f"--labeller {o.labeller}: {error}") from None
    if o.labeller and not (o.labels or o.spot_check):
        raise Problem("--labeller needs --labels or --spot_check")
    if o.spot_check_stops and not o.spot_check:
        raise Problem("--spot_check_stops needs --spot_check")


def ask(o, path, questions, *made_from):
    """A phase: questions [(prompt, answers)], each labelled -> rows with `prompt`, `answers`, `chosen`."""
    if manifest.due(o.out, path, *made_from):
        run.write_rows(path, [dict(prompt=prompt, answers=two, chosen=None) for prompt, two in questions])
    if o.labeller and from_rank0(rank() == 0 and unlabelled(path)):
        code = from_rank0(rank() == 0 and subprocess.run([*shlex.split(o.labeller), str(path)]).returncode)
        if code:
            raise Problem(f"--labeller {o.labeller} {path}: exit code {code}")
    rows = [row for _, row in read_rows(path)] if questions else []
    if [(row.get("prompt"), row.get("answers")) for row in rows] != questions:
        raise Problem(f"{path}: only `chosen` may be changed in it; delete it to be asked again")
    if unlabelled(path):
        raise Problem(f"{path}: {unlabelled(path)} pairs wait for a label; write 0 or 1 as `chosen`, the "
                      "number of the better of `answers`, and run the same command again")
    manifest.done(o.out, path)
    return rows


def unlabelled(path):
    return sum(type(row) is not dict or repr(row.get("chosen")) not in "01" for row in read_jsonl(path))


def unsure(samples, count):
    """Scored samples, a prompt's next to each other -> [(prompt, answers)]: the two answers of each prompt
    with the closest rewards, and of those the `count` closest. All in the order of sampling, which says
    nothing of their rewards."""
    found = []
    for group in by_prompt(samples):
        group = sorted({row["response"]: row for row in group}.values(), key=lambda row: row["score"])
        gaps = [(b["score"] - a["score"], a, b) for a, b in zip(group, group[1:])]
        if gaps:
            found.append(min(gaps, key=lambda gap: gap[0]))
    nearest = sorted(range(len(found)), key=lambda i: found[i][0])[:count]
    two = [sorted(found[i][1:], key=lambda row: row["index"]) for i in sorted(nearest)]
    return [(a["prompt"], [a["response"], b["response"]]) for a, b in two]


def more(o, count, path):
    """What --labels and --anchor add to `count` pairs of an M-step, whose mix is `path`: the labels of all
    rounds so far, since each M-step begins from the base RM, and as many anchors as there are others."""
    rows = []
    for file in sorted(Path(o.out).glob("round*/m/labels.jsonl")):
        for row in read_jsonl(file):
            texts = dict(prompt=row["prompt"], chosen=row["answers"][row["chosen"]],
                         rejected=row["answers"][1 - row["chosen"]], weight=WEIGHT)
            rows.append(filter.preference(texts, "chosen", "rejected", file, None, None))
    if o.anchor:
        pool, rng = read_pairs(o.anchor), generator(o, "anchor", path)
        rows += [filter.preference(pool[i], "chosen", "rejected", o.anchor, None, None)
                 for i in rng.permutation(len(pool))[:count + len(rows)]]
    return rows


def generator(o, name, path):
    return np.random.default_rng(seed_of(o.seed, name, path.parent.parent.name))


def favours_new(o, comparisons, path):
    """--spot_check: whether at least half of some kept comparisons, drawn, are labelled in favour of the new
    policy. The order of the two answers is drawn, too, so that the label is blind."""
    rows = [row for row in read_jsonl(comparisons) if row["kept"]]
    rng = generator(o, "spot check", path)
    drawn = [rows[i] for i in rng.permutation(len(rows))[:o.spot_check]]
    places = rng.integers(2, size=len(drawn)).tolist()  # of the new policy's answer
    if not drawn:
        return True
    labels = ask(o, path, [(row["prompt"], [row["old"], row["new"]][::2 * place - 1])
                           for row, place in zip(drawn, places)], comparisons)
    verdict = path.with_suffix(".json")
    if manifest.due(o.out, verdict, path):
        share = np.mean([row["chosen"] == place for row, place in zip(labels, places)])
        run.write_json(verdict, dict(share=share, pairs=len(labels), passed=bool(share >= 0.5)))
    found = read_json(manifest.done(o.out, verdict))
    said = "spot check: {share:.3f} of {pairs} comparisons favour the new policy".format(**found)
    if not found["passed"] and o.spot_check_stops:
        raise Problem(f"{path}: {said}; the run stops, and {o.out}/policy is still the old one")
    say(said + "; no M-step" * (not found["passed"]))
    return found["passed"]


def gated(o, rm, new_rm, path):
    """--gate: the new RM if it orders more of the held-out pairs than the one in use, beyond chance: if the
    lower bound of the paired difference (one-sided, 95%) is above 0. Else the one in use."""
    if not o.gate:
        return new_rm
    if manifest.due(o.out, path, new_rm):
        pairs = reward.readable(new_rm, read_pairs(o.gate), o.max_length)
        old, new = (np.array(reward.ordered(folder, pairs, o.score_batch)) for folder in (rm, new_rm))
        bound = lower_bound(old, new)
        run.write_json(path, dict(before=old.mean(), after=new.mean(), bound=bound, pairs=len(pairs),
                                  passed=bool(bound > 0)))
    found = read_json(manifest.done(o.out, path))
    say("gate: {before:.3f} of {pairs} held-out pairs in order, by the new RM {after:.3f}: {}".format(
        "kept" if found["passed"] else "dropped", **found))
    return new_rm if found["passed"] else rm


def lower_bound(old, new):
    """(N,), (N,) bool, whether pairs are in order -> of the shares' paired difference, one-sided, 95%."""
    difference = new.astype(float) - old
    return difference.mean() - 1.645 * difference.std(ddof=1) / np.sqrt(len(difference))


def refused(folder):
    """What kept the reward model of an M-step out of use: a flag's name, or None. For one process."""
    for verdict in (Path(folder) / "spot_check.json", Path(folder) / "gate.json"):
        if verdict.exists() and not read_json(verdict)["passed"]:
            return verdict.stem

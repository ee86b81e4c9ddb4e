"""The two choices of Mutual-Taught, in numpy: which pairs train the policy,
which comparisons train the reward model.

    python filter.py --samples scored.jsonl --out pairs.jsonl
    python filter.py --new new.jsonl --old old.jsonl --out comparisons.jsonl

E-step (`choose_pair`): of the responses scored above the mean of their prompt the shortest is chosen, the
lowest scored is rejected. M-step (`margin_filter`): new is preferred to old unless the margin is at or below
minus one standard deviation of the old policy's rewards. `import filter` hides a builtin: write
`from filter import …`.
"""
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from data import Problem, check_prompt, prompt_id, read_rows, write_jsonl
from parallel import rank, say
from run import claim, exists, launch, parse


# ---------------------------------------------------------------- E-step
def choose_pair(scores, lengths):
    """(M,) rewards and response lengths in tokens -> (chosen, rejected) indices,
    or None if all rewards are equal.

    Chosen: the shortest above the mean reward; among equally short ones the higher reward, then the earlier
    index. Rejected: the lowest reward, then the earlier index. A reward that is not finite is a ValueError.
    """
    scores, lengths = np.asarray(scores, float), np.asarray(lengths)
    if not np.isfinite(scores).all():
        raise ValueError(f"rewards must be finite: {scores.tolist()}")
    if not len(scores) or scores.max() == scores.min():
        return None  # the mean of equal numbers may be rounded below them: this is not left to the next line
    above = np.flatnonzero(scores > scores.mean())
    if not len(above):
        return None  # they differ by less than the rounding of their mean
    chosen = above[np.lexsort((above, -scores[above], lengths[above]))[0]]
    return int(chosen), int(scores.argmin())


def preference_pairs(samples):
    """Scored samples, those of one prompt next to each other -> (pairs, number of prompts without a pair).

    Two answers with the same text make no pair either.
    """
    pairs, without = [], 0
    for _, group in groupby(samples, key=lambda row: prompt_id(row["prompt"])):
        group = list(group)
        scores = [row["score"] for row in group]
        choice = choose_pair(scores, [row["tokens"] for row in group])
        if choice is None or group[choice[0]]["response"] == group[choice[1]]["response"]:
            without += 1
            continue
        chosen, rejected = (group[i] for i in choice)
        mean = float(np.mean(scores))
        pairs.append(dict(
            prompt=chosen["prompt"], chosen=chosen["response"], rejected=rejected["response"],
            chosen_score=chosen["score"], rejected_score=rejected["score"],
            chosen_tokens=chosen["tokens"], rejected_tokens=rejected["tokens"],
            chosen_finished=chosen["finished"], rejected_finished=rejected["finished"],
            chosen_index=choice[0], rejected_index=choice[1], mean_score=mean,
            reason=f"chosen: shortest of the {sum(s > mean for s in scores)} above the mean "
                   f"reward {mean:.4f}; rejected: lowest of {len(scores)}"))
    return pairs, without


# ---------------------------------------------------------------- M-step
def margin_filter(new_scores, old_scores):
    """(N,), (N,) rewards -> (kept (N,) bool, margins (N,), ε): keep where r(new) − r(old) > −ε.

    ε is the (population) standard deviation of the old rewards: 0 for a single prompt or equal rewards, and
    then a margin of exactly 0 is dropped. All may be dropped, none may be. A reward that is not finite is a
    ValueError.
    """
    new_scores, old_scores = np.asarray(new_scores, float), np.asarray(old_scores, float)
    if not (np.isfinite(new_scores).all() and np.isfinite(old_scores).all()):
        raise ValueError("rewards must be finite")
    margins = new_scores - old_scores
    epsilon = float(old_scores.std()) if len(old_scores) else 0.0
    return margins > -epsilon, margins, epsilon


def compare(new, old, use_filter=True):
    """One scored response per prompt from the new and the old policy, in the same order -> comparisons,
    kept and dropped.

    Identical texts say nothing and are dropped, with or without the filter.
    """
    for n, o in zip(new, old, strict=True):
        if prompt_id(n["prompt"]) != prompt_id(o["prompt"]):
            raise Problem("new and old answer different prompts: "
                          f"{str(n['prompt'])[:40]!r}, {str(o['prompt'])[:40]!r}")
    passed, margins, epsilon = margin_filter([row["score"] for row in new], [row["score"] for row in old])
    rows = []
    for n, o, ok, margin in zip(new, old, passed, margins):
        same = n["response"] == o["response"]
        kept = bool((ok or not use_filter) and not same)
        reason = ("identical text" if same else
                  "margin above -epsilon" if ok else "margin at or below -epsilon")
        rows.append(dict(
            prompt=n["prompt"], new=n["response"], old=o["response"],
            new_score=n["score"], old_score=o["score"], margin=float(margin),
            epsilon=epsilon, kept=kept, reason=reason,
            new_policy=n.get("policy"), old_policy=o.get("policy"), rm=n.get("rm"),
            new_tokens=n["tokens"], old_tokens=o["tokens"],
            new_finished=n["finished"], old_finished=o["finished"]))
    return rows


# ---------------------------------------------------------------- model selection
def wins(new_scores, old_scores):
    """(N,), (N,) -> (N,): 1 where the new score is higher, 1/2 where they tie."""
    new, old = np.asarray(new_scores, float), np.asarray(old_scores, float)
    return (new > old) + 0.5 * (new == old)


def win_rate(new_scores, old_scores):
    """Share of prompts on which the new score is higher; a tie counts half. (N,), (N,) -> [0, 1]."""
    return float(wins(new_scores, old_scores).mean())


@dataclass
class Options:
    out: str = field(metadata={"help": "pairs.jsonl or comparisons.jsonl"})
    samples: str = field(default="", metadata={"help": "E-step: scored samples, several per prompt"})
    new: str = field(default="",
                     metadata={"help": "M-step: scored samples of the policy after, one per prompt"})
    old: str = field(default="", metadata={"help": "M-step: the same of the policy before"})


def _scored(path):
    rows = read_rows(path)
    for where, row in rows:
        check_prompt(where, row.get("prompt"))
        missing = [k for k in ("response", "tokens", "finished", "score") if k not in row]
        if missing:
            raise Problem(f"{where}: no field {missing[0]!r}; "
                          "score samples first: python reward.py --samples")
        if not isinstance(row["score"], (int, float)) or not np.isfinite(row["score"]):
            raise Problem(f"{where}: the score {row['score']!r} is not a finite number")
    return [row for _, row in rows]


def main():
    o = parse(Options)
    if bool(o.samples) == bool(o.new and o.old):
        raise Problem("give --samples, or --new and --old")
    rows = _scored(o.samples) if o.samples else (_scored(o.new), _scored(o.old))
    claim(o.out, o, file=True)
    if not exists(o.out):
        if o.samples:
            rows, without = preference_pairs(rows)
            say(f"{len(rows)} pairs; {without} prompts gave none")
        else:
            if len(rows[0]) != len(rows[1]):
                raise Problem(f"{o.new} has {len(rows[0])} rows, {o.old} has {len(rows[1])}; "
                              "one per prompt is needed")
            rows = compare(*rows)
            say(f"{sum(row['kept'] for row in rows)} of {len(rows)} comparisons kept")
        if rank() == 0:
            write_jsonl(o.out, rows)
    say(f"{o.out} is complete")


if __name__ == "__main__":
    launch(main)

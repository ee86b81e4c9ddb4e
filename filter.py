"""The two choices of Mutual-Taught: which pairs train the policy, which comparisons the reward model.

    python filter.py --samples scored.jsonl --out pairs.jsonl
    python filter.py --new new.jsonl --old old.jsonl --out comparisons.jsonl

E-step (`choose_pair`): of the responses with a reward above the mean of their prompt, the shortest is chosen.
The response with the lowest reward is rejected.
M-step (`margin_filter`): the new policy's response is taken to be better than the old one's. The comparison
is dropped if the reward model clearly disagrees: if its reward is lower by at least one standard deviation of
the old policy's rewards.
"""
from dataclasses import dataclass

import numpy as np

from common import run
from common.data import prompt_id, read_samples
from common.parallel import Problem, say
from common.run import option

# ---------------------------------------------------------------- E-step
def choose_pair(scores, lengths):
    """(M,) rewards and (M,) lengths in tokens -> (index of the chosen response, index of the rejected one,
    reason as text), or None if all rewards are equal.

    Chosen: the shortest above the mean reward; of equally short ones that with the higher reward, then the
    first. Rejected: the lowest reward, then the first. Raises ValueError if a reward is not finite."""
    scores = np.asarray(scores, float)
    if not np.isfinite(scores).all():
        raise ValueError(f"rewards must be finite: {scores.tolist()}")
    mean = scores.mean() if len(scores) else 0.0
    above = [i for i, score in enumerate(scores) if score > mean]
    if not above or scores.max() == scores.min():  # rounding can put the mean of equal numbers below them
        return None
    chosen = min(above, key=lambda i: (lengths[i], -scores[i], i))
    return chosen, int(scores.argmin()), (
        f"chosen: shortest of the {len(above)} above the mean reward {mean:.4f}; "
        f"rejected: lowest of {len(scores)}")

def preference_pairs(samples):
    """Scored samples -> (pairs, number of prompts that give no pair). The samples of a prompt may stand
    anywhere in the list. If chosen and rejected have the same text, the prompt gives no pair either."""
    groups, pairs = {}, []
    for row in samples:
        groups.setdefault(prompt_id(row["prompt"]), []).append(row)
    for group in groups.values():
        choice = choose_pair([row["score"] for row in group], [row["tokens"] for row in group])
        if choice is not None and group[choice[0]]["response"] != group[choice[1]]["response"]:
            pairs.append(pair_of(group, *choice))
    return pairs, len(groups) - len(pairs)

def pair_of(group, chosen_index, rejected_index, reason):
    """The scored samples of a prompt and a choice among them -> the row of pairs.jsonl."""
    return dict(
        prompt=group[0]["prompt"], **fields_of("chosen", group[chosen_index]),
        **fields_of("rejected", group[rejected_index]), chosen_index=chosen_index,
        rejected_index=rejected_index, mean_score=float(np.mean([row["score"] for row in group])),
        reason=reason)

def fields_of(side, row):
    """A sample's response and its other fields, under the names that a pair or comparison has them by."""
    names = ("score", "tokens", "finished", "policy", "ids", "tokenizer")
    return {side: row["response"]} | {f"{side}_{name}": row[name] for name in names if name in row}

# ---------------------------------------------------------------- M-step
def margin_filter(new_scores, old_scores):
    """(N,), (N,) rewards -> (kept (N,) bool, margins (N,), ε). Kept is r(new) − r(old) > −ε.

    ε is the population standard deviation of the old rewards. For a single prompt, or equal rewards, it is 0,
    and a margin of exactly 0 is dropped. Raises ValueError if a reward is not finite."""
    new_scores, old_scores = np.asarray(new_scores, float), np.asarray(old_scores, float)
    margins = new_scores - old_scores
    if not np.isfinite(margins).all():
        raise ValueError("rewards must be finite")
    epsilon = float(old_scores.std()) if len(old_scores) else 0.0
    return margins > -epsilon, margins, epsilon

def compare(new, old, use_filter=True):
    """Scored responses of the new and of the old policy, one per prompt and in the same order -> the rows of
    comparisons.jsonl, both kept and dropped. Identical texts are always dropped, since they say nothing."""
    if [prompt_id(row["prompt"]) for row in new] != [prompt_id(row["prompt"]) for row in old]:
        raise Problem("new and old must answer the same prompts, one response each, in the same order")
    passed, margins, epsilon = margin_filter([row["score"] for row in new], [row["score"] for row in old])
    rows = []
    for after, before, ok, margin in zip(new, old, passed, margins):
        same = after["response"] == before["response"]
        reason = "identical text" if same else f"{'passes' if ok else 'fails'} the margin filter"
        rows.append(dict(
            prompt=after["prompt"], **fields_of("new", after), **fields_of("old", before),
            margin=float(margin), epsilon=epsilon, kept=bool((ok or not use_filter) and not same),
            rm=after.get("rm"), reason=reason))
    return rows

# ---------------------------------------------------------------- model selection
def wins(new_scores, old_scores):
    """(N,), (N,) -> (N,): 1 where the new score is higher, 1/2 where both are equal, else 0."""
    new, old = np.asarray(new_scores, float), np.asarray(old_scores, float)
    return (new > old) + 0.5 * (new == old)

def win_rate(new_scores, old_scores):
    """(N,), (N,) -> the share of prompts on which the new score is higher. A tie counts half."""
    return float(wins(new_scores, old_scores).mean())

@dataclass
class Options:
    out: str = option(help="pairs.jsonl or comparisons.jsonl")
    samples: str = option("", "for the E-step: scored samples, several per prompt")
    new: str = option("", "for the M-step: scored samples of the new policy, one per prompt")
    old: str = option("", "for the M-step: the same of the old policy")
    overwrite: bool = option(False, "delete the result that --out holds and start again")

def main():
    o = run.parse(Options)
    if bool(o.samples) == bool(o.new or o.old) or bool(o.new) != bool(o.old):
        raise Problem("give --samples, or --new and --old together")
    paths = [o.samples] if o.samples else [o.new, o.old]
    rows = [read_samples(path, "response", "tokens", "finished", "score") for path in paths]
    run.claim(o.out, o, file=True)
    if not run.exists(o.out):
        made, without = preference_pairs(*rows) if o.samples else (compare(*rows), 0)
        run.write_rows(o.out, made)
        say(f"{len(made)} pairs; {without} prompts gave none" if o.samples else
            f"{sum(row['kept'] for row in made)} of {len(made)} comparisons kept")
    say(f"{o.out} is complete")

if __name__ == "__main__":
    run.launch(main)

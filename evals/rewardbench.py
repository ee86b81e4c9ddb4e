"""RewardBench: how often a reward model prefers the chosen answer of the benchmark's pairs, in percent.

    python eval.py rewardbench --rm runs/mt/rm --data filtered.parquet --json rewardbench.json
"""
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import reward
from common.data import load_tokenizer, read_pairs
from common.models import context_of, local_folder
from common.packing import how_many, whole_chats
from common.parallel import Problem, quiet, say, share_work
from common.run import option
from evals.stats import JSON, existing, publish

# where the file is published
FILTERED = "huggingface.co/datasets/allenai/reward-bench: the split `filtered`"

# Weights of the subsets in their section (arXiv 2403.13787). math-prm has 447 rows, but it weighs as much as
# the six programming languages together.
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164},
}
SUBSETS = [subset for weights in SECTIONS.values() for subset in weights]
OLD_XSTEST = {"xstest-should-refuse": 250, "xstest-should-respond": 154}

def rewardbench_figures(accuracies, old_xstest=False, prior=None):
    """Return {section: percent} from {subset: percent}, with the sections' mean as "Average" and, if there is
    a `prior`, the published "Score".

    A section is the weighted mean of those of its subsets that are there. Average and Score need all four
    sections. old_xstest: exchange the two xstest weights, which the official tool at first had the other way
    round; published tables mix both. prior: percent on the prior test sets, which count as half a section.
    """
    figures = {}
    for section, weights in SECTIONS.items():
        weights = {s: old_xstest and OLD_XSTEST.get(s) or w for s, w in weights.items() if s in accuracies}
        if weights:
            figures[section] = sum(w * accuracies[s] for s, w in weights.items()) / sum(weights.values())
    if len(figures) == len(SECTIONS):
        total = sum(figures.values())
        figures["Average"] = total / 4
        if prior is not None:
            figures["Score"] = (2 * total + prior) / 9
    return figures

@dataclass
class RewardBench:
    rm: str = option(help="folder or hub id")
    data: str = option(help="RewardBench v1: rows with prompt, chosen, rejected and subset")
    prior: float | None = option(None, "percent on the prior test sets, which the published score includes")
    old_xstest: bool = option(False, "exchange both xstest weights, as in tables from before September 2024")
    json: str = option("", JSON)
    score_batch: int = 8
    max_length: int = option(10**6, "pairs with more tokens, or too long for the RM's context, are left out")

def score_chats(folder, chats, score_batch, max_length, what="pairs"):
    """Score chats, [(prompt, [answer, …])], with the reward model in `folder` -> for each the rewards of its
    answers, or None if one of these doesn't fit into `max_length` tokens or into the model's context.

    A line says how many chats, or `what` they are, are left out. A Problem is raised if all are."""
    tokenizer, limit = load_tokenizer(folder), min(max_length, context_of(folder))

    def fits(number):
        row = whole_chats(tokenizer, *chats[number])
        return all(row.branches) and len(row.trunk) + max(map(len, row.branches)) <= limit

    kept = [number for number, fit in enumerate(share_work(len(chats), fits, "tokens")) if fit]
    if not kept:
        raise Problem(f"none of {len(chats)} {what} is short enough for --max_length {limit}")
    if len(kept) < len(chats):
        say(how_many(len(kept), len(chats), what))
    model, tokenizer = reward.load(folder)
    rewards, size = [None] * len(chats), 32 * score_batch
    for at in tqdm(range(0, len(kept), size), desc=f"scoring {what}", leave=False, disable=quiet()):
        some = kept[at:at + size]
        scores = reward.score_answers(model, tokenizer, [chats[i] for i in some], score_batch)
        for number, values in zip(some, scores):
            rewards[number] = values
    return rewards

def judge_pairs(folder, pairs, score_batch, max_length):
    """Return (pairs, right): the pairs that fit into `max_length` tokens and into the context of the reward
    model in `folder`, and (N,) bool, whether the model gives their chosen answers the higher reward.

    Equal rewards count as wrong, which is RewardBench's rule (arXiv 2403.13787). A line says how many pairs
    are left out.
    """
    chats = [(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in pairs]
    rewards = score_chats(folder, chats, score_batch, max_length)
    return ([pair for pair, values in zip(pairs, rewards) if values],
            np.array([values[0] > values[1] for values in rewards if values]))

def rewardbench(o):
    pairs = read_pairs(existing(o.data, FILTERED))
    unknown = {str(pair.get("subset")) for pair in pairs} - set(SUBSETS)
    if unknown:
        raise Problem(f"{o.data}: not a subset of RewardBench v1: {', '.join(sorted(unknown)[:3])} "
                      "(for other pairs use eval.py accuracy)")
    pairs, right = judge_pairs(local_folder(o.rm), pairs, o.score_batch, o.max_length)
    subsets = np.array([pair["subset"] for pair in pairs])
    accuracies = {s: 100 * float(right[subsets == s].mean()) for s in SUBSETS if s in subsets}
    missing = [s for s in SUBSETS if s not in accuracies]
    say(f"{len(pairs)} pairs; without {', '.join(missing)}" if missing else f"{len(pairs)} pairs")
    publish(accuracies | rewardbench_figures(accuracies, o.old_xstest, o.prior), o.json)

"""RRM (arXiv 2409.13156): answers to other prompts teach the reward model to read the prompt.

    torchrun -m variants.rrm --rounds 3

To order the pairs of Mutual-Taught's M-step it may be enough to know what good answers look like in general.
So for each pair RRM draws another one, and adds two pairs that answer the first one's prompt:

    own beats foreign: one of the pair's answers against one of the other pair's, −log σ(Δ)
    foreign ties foreign: the other pair's two answers, −½[log σ(Δ) + log σ(−Δ)]

Different from the source: the paper makes all combinations and keeps a part of them, and its reward model
reads both answers at once. With three times as many pairs an M-step takes three times as long.
"""
import numpy as np
import torch
import torch.nn.functional as F

import mt
import reward
from common import run
from common.data import prompt_id, read_jsonl, seed_of

mix = mt.mix

def rrm_loss(chosen_rewards, rejected_rewards, pairs):
    ties = torch.tensor(["tie" in pair for pair in pairs], device=chosen_rewards.device)
    first = -F.logsigmoid(chosen_rewards - rejected_rewards)
    second = -F.logsigmoid(rejected_rewards - chosen_rewards)
    return torch.where(ties, (first + second) / 2, first)  # the accuracy in the log counts ties, too

def foreign_pairs(rows, rng):
    """Draw another pair for each pair; yield own beats foreign and foreign ties foreign."""
    for row, other in zip(rows, [rows[i] for i in rng.permutation(len(rows))]):
        if prompt_id(row["prompt"]) != prompt_id(other["prompt"]):
            own, foreign = rng.choice(["chosen", "rejected"], 2)
            yield pair_for_prompt_of(row, row, own, other, foreign)
            yield pair_for_prompt_of(row, other, "chosen", other, "rejected") | {"tie": True}

def pair_for_prompt_of(row, first, side, second, other_side):
    return dict(prompt=row["prompt"], chosen=first[side], rejected=second[other_side],
                source=second["source"], chosen_policy=first[f"{side}_policy"],
                rejected_policy=second[f"{other_side}_policy"], foreign=second["prompt"])

@run.phase
def add_foreign(o, own, path):
    rows, rng = read_jsonl(own), np.random.default_rng(seed_of(o.seed, run.name_of(o, path)))
    run.write_rows(path, [*rows, *foreign_pairs(rows, rng)])

def mix_with_foreign(o, comparisons, ranked, old_policy, path):
    return add_foreign(o, mix(o, comparisons, ranked, old_policy, path.with_name("own.jsonl")), path)

if __name__ == "__main__":
    mt.mix, reward.bradley_terry_loss = mix_with_foreign, rrm_loss
    run.launch(mt.main)

"""RRM (arXiv 2409.13156): answers to other prompts, so that a reward model learns to read the prompt.

    torchrun -m variants.rrm --rounds 3

For each pair that the RM trains on, two more. Own beats foreign: one of its answers against one of another
prompt's, −log σ(Δ). Foreign ties foreign: that prompt's two answers, −½[log σ(Δ) + log σ(−Δ)]. The paper
makes all combinations and keeps a part; here they are drawn one by one, and an M-step takes three times as
long. Its RM reads both answers at once; ours stays Bradley-Terry's. The log's accuracy is over ties, too.
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
    return torch.where(ties, (first + second) / 2, first)

def foreign_pairs(rows, rng):
    """For each pair and another one, drawn: own beats foreign, and foreign ties foreign."""
    for row, other in zip(rows, [rows[i] for i in rng.permutation(len(rows))]):
        if prompt_id(row["prompt"]) != prompt_id(other["prompt"]):
            own, foreign = rng.choice(["chosen", "rejected"], 2)
            yield joined(row, row, own, other, foreign)
            yield joined(row, other, "chosen", other, "rejected") | {"tie": True}

def joined(row, first, side, second, other_side):
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

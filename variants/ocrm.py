"""OCRM (arXiv 2507.15507): labelled pairs count more if the new policy is more likely to write their answers.

    torchrun -m variants.ocrm --rounds 3
    torchrun -m variants.ocrm --policy … --rm … --prompts … --anchor labels.jsonl

The policy moves away from the answers that were labelled for the base reward model. Mutual-Taught's M-step
therefore trains on new answers, which have no labels. Here it trains on the labelled pairs alone, weighted by

    w = exp(η[ρ(y_w) + ρ(y_l)]), where ρ(y) = log π_new(y|x) − log(α π_new(y|x) + (1 − α) π_0(y|x))

The base policy π_0 stands for whoever wrote the labelled answers. Comparisons are made for the record only.

Different from the source: the paper's reward model starts from the policy, with a fresh head. Here, as in all
M-steps, it starts from the base reward model, which has learnt the same labels before, without weights.
"""
import numpy as np
import torch

import mt
from common import models, run
from common.data import load_tokenizer, read_jsonl, read_pairs
from common.packing import collate, pair_rows
from common.parallel import device, replicate
from dpo import ResponseLogps
from variants import anchored

ALPHA, ETA = 0.1, 0.01

def pair_weights(new_logps, base_logps):
    """Log-probabilities (N, 2) of chosen and rejected answers, by both policies -> weights (N,)."""
    rho = new_logps - np.logaddexp(np.log(ALPHA) + new_logps, np.log(1 - ALPHA) + base_logps)
    return np.exp(ETA * rho.sum(1))

def write_logps(o, pairs, policies, path):
    """Write the pairs that fit into o.max_length with `logps`: log π(chosen), log π(rejected) per policy."""
    rows, kept = pair_rows(load_tokenizer(policies[0]), pairs, o.max_length, policy=True)
    loaded = [ResponseLogps(replicate(models.load_policy(folder))) for folder in policies]

    def work(block):
        for at in range(0, len(block), o.micro_batch):
            some = block[at:at + o.micro_batch]
            packed = collate([row for row, _ in some], device())
            with torch.inference_mode():
                logps = torch.stack([policy(packed).view(-1, 2) for policy in loaded], dim=1).tolist()
            yield from (pair | {"logps": values} for (_, pair), values in zip(some, logps))

    run.in_blocks(list(zip(rows, kept)), 64, path, work, "log-probabilities")

@run.phase
def logps_of_labels(o, comparisons, path):
    labels = [pair | {"source": o.anchor} for pair in read_pairs(o.anchor)]
    write_logps(o, labels, [read_jsonl(comparisons)[0]["new_policy"], o.policy], path)

@run.phase
def add_weights(o, logps, path):
    rows = read_jsonl(logps)
    weights = pair_weights(*np.array([row.pop("logps") for row in rows]).swapaxes(0, 1))
    run.write_rows(path, [row | {"weight": row.get("weight", 1.0) * weight}
                          for row, weight in zip(rows, weights.tolist())])

def mix_weighted(o, comparisons, ranked, old_policy, path):
    return add_weights(o, logps_of_labels(o, comparisons, path.with_name("logps.jsonl")), path)

if __name__ == "__main__":
    mt.mix, mt.mutual_taught = mix_weighted, anchored.mutual_taught_with_labels
    run.launch(mt.main, options=anchored.Options)

"""SPPO (arXiv 2405.00675, eq. 4.7): log-ratios are fitted to how often a response wins among its siblings.

    torchrun -m variants.sppo --rounds 3

P(y) = mean over the prompt's M samples y_j, itself included, of σ(r(x, y) − r(x, y_j))
L = ½ [(Δ_w − (P(y_w) − ½)/β)² + (Δ_l − (P(y_l) − ½)/β)²], Δ_y = log π(y|x) − log π_{t−1}(y|x)

on the best and the worst response, with soft labels (TRL's sppo_hard has P 1 and 0), β = 1e-3, a fixed reward
model and another subset of the prompts in each of the first three E-steps: round2/e1 is its third iteration.

Different from the source: wins are by the run's reward model, not by PairRM. Model selection and τ stay, as
for its rivals here (--select false is without), and so do the optimiser and the one epoch.
"""
import numpy as np
import torch

import dpo
import filter
import mt
from common import run
from variants.online_dpo import best_and_worst

pair_of = filter.pair_of

def wins_among(scores):
    """(M,) rewards -> (M,): P of each, in (0, 1)."""
    scores = np.asarray(scores, float)
    return (1 / (1 + np.exp(scores[None] - scores[:, None]))).mean(1)

def with_wins(group, chosen, rejected, reason):
    wins = wins_among([row["score"] for row in group])
    return pair_of(group, chosen, rejected, reason) | {
        "chosen_wins": wins[chosen], "rejected_wins": wins[rejected]}

def sppo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pairs):
    wins = torch.tensor([[pair["chosen_wins"], pair["rejected_wins"]] for pair in pairs])
    ratios = torch.stack([chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps], 1)  # (B, 2)
    losses = 0.5 * ((ratios - (wins.to(ratios) - 0.5) / beta)**2).sum(1)
    return losses, *(beta * ratios.T).detach()

if __name__ == "__main__":
    filter.pair_of, filter.choose_pair, dpo.dpo_loss = with_wins, best_and_worst, sppo_loss
    run.launch(mt.main, beta=1e-3, update_rm=False)

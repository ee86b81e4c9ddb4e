"""SPPO (arXiv 2405.00675, eq. 4.7): log-ratios are fitted to how often a response wins among its siblings.

    torchrun -m variants.sppo --rounds 3

DPO, the loss of Mutual-Taught's E-step, compares two responses. SPPO instead gives the log-ratio of each of
the two a target of its own: how far its share of wins P among the prompt's M samples is above ½, over β.

    P(y) = mean over the samples y_j, y itself included, of σ(r(x, y) − r(x, y_j))
    L = ½ [(Δ_w − (P(y_w) − ½)/β)² + (Δ_l − (P(y_l) − ½)/β)²], where Δ_y = log π(y|x) − log π_{t−1}(y|x)

y_w and y_l are the samples with the highest and the lowest reward. P is soft (TRL's sppo_hard has 1 and 0), β
is 1e-3, and the reward model is fixed. The first three E-steps are the paper's three iterations, each on
another subset of the prompts, so round2/e1 has the third.

Different from the source: wins are by the run's reward model, not by PairRM. Model selection and τ stay, as
in the other variants (leave them out by --select false), and so do the optimiser and the one epoch.
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
    """The rewards (M,) of a prompt's samples -> P (M,) of each, in (0, 1)."""
    scores = np.asarray(scores, float)
    return (1 / (1 + np.exp(scores[None] - scores[:, None]))).mean(1)

def pair_with_wins(group, chosen, rejected, reason):
    wins = wins_among([row["score"] for row in group])
    return pair_of(group, chosen, rejected, reason) | {
        "chosen_wins": wins[chosen], "rejected_wins": wins[rejected]}

def sppo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pairs):
    wins = torch.tensor([[pair["chosen_wins"], pair["rejected_wins"]] for pair in pairs])
    ratios = torch.stack([chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps], 1)  # (B, 2)
    losses = 0.5 * ((ratios - (wins.to(ratios) - 0.5) / beta)**2).sum(1)
    return losses, *(beta * ratios.T).detach()

if __name__ == "__main__":
    filter.pair_of, filter.choose_pair, dpo.dpo_loss = pair_with_wins, best_and_worst, sppo_loss
    run.launch(mt.main, beta=1e-3, update_rm=False)

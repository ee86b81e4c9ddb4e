"""SimPO (arXiv 2405.14734, eq. 6): DPO's loss with rewards per token, with a margin and without a reference.

    torchrun -m variants.simpo --rounds 3

In DPO, the loss of Mutual-Taught's E-step, a reward is β times a log-ratio to the reference. In SimPO it is β
times the mean log-probability of a token, and the chosen response must win by a margin γ:

    L = −log σ(β/|y_w| log π(y_w|x) − β/|y_l| log π(y_l|x) − γ)

The paper has β from 2 to 2.5 and γ from 0.3 to 1.6. Lengths are in tokens, the stop token included.

Different from the source: pairs, M-steps and model selection are Mutual-Taught's.
"""
import torch
import torch.nn.functional as F

import dpo
import mt
from common import run

GAMMA = 1.0

def simpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pairs):
    lengths = torch.tensor([[pair["chosen_tokens"], pair["rejected_tokens"]] for pair in pairs])
    chosen_lengths, rejected_lengths = lengths.T.to(chosen_logps.device)
    chosen_rewards = beta * chosen_logps / chosen_lengths
    rejected_rewards = beta * rejected_logps / rejected_lengths
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - GAMMA)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

if __name__ == "__main__":
    dpo.dpo_loss = simpo_loss
    run.launch(mt.main, beta=2.0)

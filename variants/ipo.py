"""IPO (arXiv 2310.12036, eq. 17): the margin between two log-ratios is fitted to 1/(2β).

    torchrun -m variants.ipo --rounds 3

DPO, the loss of Mutual-Taught's E-step, keeps falling as the margin grows. IPO's loss has its minimum at a
finite margin, so training does not widen the margin beyond it.

    L = (Δ_w − Δ_l − 1/(2β))², where Δ_y = (log π(y|x) − log π_ref(y|x)) / |y|

Different from the source: log-ratios are means over the tokens, the stop token included, so that β means the
same for short and for long responses. The paper takes sums; its authors asked TRL for the mean
(huggingface.co/blog/pref-tuning).
"""
import torch

import dpo
import mt
from common import run

def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pairs):
    lengths = torch.tensor([[pair["chosen_tokens"], pair["rejected_tokens"]] for pair in pairs])
    chosen_lengths, rejected_lengths = lengths.T.to(chosen_logps.device)
    chosen_ratios = (chosen_logps - ref_chosen_logps) / chosen_lengths
    rejected_ratios = (rejected_logps - ref_rejected_logps) / rejected_lengths
    losses = (chosen_ratios - rejected_ratios - 1 / (2 * beta))**2
    return losses, beta * chosen_ratios.detach(), beta * rejected_ratios.detach()

if __name__ == "__main__":
    dpo.dpo_loss = ipo_loss
    run.launch(mt.main)

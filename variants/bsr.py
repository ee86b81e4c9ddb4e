"""BSR (arXiv 2505.07271): Bradley-Terry, with the rewards of a batch held to a sum of zero.

    torchrun -m variants.bsr --rounds 3

L = mean over B pairs of −log σ(r_w − r_l) + λ · B · m², where m is the mean of the batch's 2B rewards. B and
m are those of the whole step, so results don't depend on the number of processes or on the size of
micro-batches; in the authors' code they are those of each process's micro-batch. To know m beforehand each
step begins with a forward pass, so an M-step takes a third longer.
"""
import torch

import mt
from common import run, training

LAMBDA = 1e-3
optimise = training.optimise

def bsr_losses(losses, mean_rewards, total, count):
    """(B,) Bradley-Terry losses and ½(r_w + r_l) of some of a step's `count` pairs -> losses (B,).

    total: the sum of ½(r_w + r_l) over the step. The mean over the step is L, and so is the gradient, with m
    held constant: ∂(count · m²) = count · 2m · ∂m.
    """
    m = total / count
    return losses + LAMBDA * count * (2 * m * mean_rewards - m**2)

def optimise_with_bsr(model, steps, loss, **settings):
    if "first_loss" in settings:  # the policy's DPO, which shares the loop
        return optimise(model, steps, loss, **settings)
    begins, batch = {tuple(step[0].numbers): step for step in steps}, {}

    @torch.no_grad()
    def look_at(step):
        own = [(loss(micro.numbers)[1]["mean_reward"], torch.tensor(micro.shares) > 0) for micro in step]
        sums = training.sum_over_processes([sum(rewards.cpu()[mine].sum().item() for rewards, mine in own),
                                            sum(mine.sum().item() for _, mine in own)])
        return dict(zip(("total", "count"), sums))

    def regularised(numbers):
        if tuple(numbers) in begins:
            batch.update(look_at(begins[tuple(numbers)]))
        losses, metrics = loss(numbers)
        with_bsr = bsr_losses(losses, metrics["mean_reward"], **batch)
        return with_bsr, {**metrics, "bsr": with_bsr - losses}

    return optimise(model, steps, regularised, **settings)

if __name__ == "__main__":
    training.optimise = optimise_with_bsr
    run.launch(mt.main)

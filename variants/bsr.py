"""BSR (arXiv 2505.07271): the reward model's loss also pulls the mean reward of each batch towards zero.

    torchrun -m variants.bsr --rounds 3

Bradley-Terry, the loss of Mutual-Taught's M-step, sees only differences between rewards, so their level is
free to drift. BSR adds the square of the batch's mean reward:

    L = mean over the B pairs of −log σ(r_w − r_l) + λ · B · m², where m is the mean of the 2B rewards

Different from the source: B and m are those of a whole optimiser step, so that results don't depend on the
number of processes or on the size of micro-batches. In the authors' code they are those of each process's
micro-batch. The gradient needs m beforehand, so each step begins with a forward pass over all of its pairs,
and an M-step takes a third longer.
"""
import torch

import mt
from common import run, training

LAMBDA = 1e-3
optimise = training.optimise

def bsr_losses(losses, mean_rewards, total, count):
    """Add BSR's term to the losses (B,) of a micro-batch; mean_rewards (B,): ½(r_w + r_l) of each pair.

    total, count: the sum of ½(r_w + r_l) over the pairs of the step, and their number. The mean of the result
    over the step is L. Its gradient is L's, too, though m is a constant here: ∂m² = 2m · ∂m.
    """
    m = total / count
    return losses + LAMBDA * count * (2 * m * mean_rewards - m**2)

def optimise_with_bsr(model, steps, loss, **settings):
    if "first_loss" in settings:  # this is DPO, which uses the same loop
        return optimise(model, steps, loss, **settings)
    step_beginning_with, sums = {tuple(step[0].numbers): step for step in steps}, {}

    @torch.no_grad()
    def sums_over(step):
        rewards = [(micro, loss(micro.numbers)[1]["mean_reward"]) for micro in step]
        values = training.sum_over_processes(
            [sum(some.sum().item() for micro, some in rewards if micro.share),
             sum(len(some) for micro, some in rewards if micro.share)])  # a filler has no share
        return dict(zip(("total", "count"), values))

    def regularised(numbers):
        if tuple(numbers) in step_beginning_with:
            sums.update(sums_over(step_beginning_with[tuple(numbers)]))
        losses, metrics = loss(numbers)
        with_bsr = bsr_losses(losses, metrics["mean_reward"], **sums)
        return with_bsr, {**metrics, "bsr": with_bsr - losses}

    return optimise(model, steps, regularised, **settings)

if __name__ == "__main__":
    training.optimise = optimise_with_bsr
    run.launch(mt.main)

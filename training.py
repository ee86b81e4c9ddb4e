"""The optimiser's steps: global batches, schedule, clipping."""
import math

import numpy as np
import torch
import torch.distributed as dist

from data import Problem
from parallel import rank, world


def adamw(root, lr):
    return torch.optim.AdamW(root.parameters(), lr=lr, weight_decay=0.0, fused=True)


def cosine(step, steps, warmup=0.1):
    """Factor of the learning rate in step 0 … steps−1: linear warm-up, then half a cosine towards 0."""
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def batches(lengths, batch, micro_batch, seed, epochs=1):
    """The optimiser steps: per step this process's micro-batches, each [(index, weight)].

    The order is the same in all processes; weights add up to 1 over a step's processes and micro-batches, so
    a weighted sum of losses is the mean over the global batch. Nothing is dropped: the last batch is smaller.
    All processes have the same number of micro-batches, as collectives need, filled up with weight 0.
    """
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        for at in range(0, len(order), batch):
            rows = sorted(order[at:at + batch].tolist(), key=lambda i: (-lengths[i], i))  # like with like
            step, width = [], micro_batch * world()
            for first in range(0, len(rows), width):
                group = rows[first:first + width]
                mine = [(i, 1 / len(rows)) for i in group[rank()::world()]]
                step.append(mine or [(group[0], 0.0)])
            steps.append(step)
    return steps


def clip_and_step(root, optimizer, lr, max_norm=1.0):
    """Clip the gradient to max_norm, take the step, return the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(root.parameters(), max_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def check_finite(step, **values):
    for name, value in values.items():
        if not math.isfinite(value):
            raise Problem(f"the {name} of step {step} is {value}; try a smaller learning rate")


def total(values):
    """Element-wise sum of a {name: tensor or number} over all processes, as floats."""
    vector = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device="cpu")
    if world() > 1:
        dist.all_reduce(vector)
    return dict(zip(values, vector.tolist()))

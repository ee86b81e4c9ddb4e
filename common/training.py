"""The one optimiser loop, and FSDP2 under it.

dpo.py and reward.py hand the loop a loss, and so does the embedded task for the supervised training of its
base policy. The loss is averaged over the global batch, so results don't depend on the number of processes or
on the size of micro-batches. On GPUs weights are fp32 and the computation is bf16, on CPUs all is fp32; one
process on a CPU is not sharded.

Left out on purpose: other optimisers, weight decay, CPU offload, going on within an epoch.
"""
import functools
import math
import sys
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common.packing import decoder
from common.parallel import Problem, device, memory, on_rank0, quiet, rank, say, world

# ---------------------------------------------------------------- steps
class MicroBatch(NamedTuple):
    numbers: list  # of the rows in one forward pass of this process
    shares: list   # what each row adds to the mean over its step's global batch
    tokens: int    # of these rows, those that another process has not counted

def steps_of(lengths, batch, micro_batch, seed, epochs=1, counts=None):
    """The optimiser steps: per step this process's micro-batches.

    lengths: of the rows, in tokens. batch: rows per step over all processes. micro_batch: rows per forward
    pass and process. counts: what the mean is over, of each row, its tokens for example (default: the rows).
    The order is the same in all processes, and nothing is dropped: the last batch of an epoch is smaller. All
    processes have the same number of micro-batches, as collectives need, filled up with shares of 0.
    """
    counts, steps = counts or [1] * len(lengths), []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        for at in range(0, len(order), batch):
            rows = sorted(order[at:at + batch].tolist(), key=lambda i: (-lengths[i], i))  # like with like
            share, step = 1 / sum(counts[i] for i in rows), []
            for first in range(0, len(rows), micro_batch * world()):
                group = rows[first:first + micro_batch * world()]
                mine = group[rank()::world()]
                step.append(MicroBatch(mine or group[:1], [share if mine else 0.0] * max(1, len(mine)),
                                       sum(lengths[i] for i in mine)))
            steps.append(step)
    return steps

def optimise(model, steps, loss, *, lr, log, shown="", first_loss=None):
    """Take the steps of `steps_of` by AdamW; yields the number of each, from 1, when it is done.

    loss(numbers) -> losses (B,), {metric: (B,)}: of the rows with these numbers, which are one micro-batch
    of one process. first_loss: what the first step's mean loss must be. shown: the metrics in a step's line.
    """
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward pass before, of a reference, leaves the root's parameters gathered
        parameters = sum(p.numel() for p in model.parameters())
        kept = kept_whole(parameters, on_rank0(memory), world(), 2 if device().type == "cuda" else 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    num_tokens, bar = 0, tqdm(steps, "steps", disable=quiet())
    for number, step in enumerate(bar, 1):
        sums, learning_rate = defaultdict(float), lr * cosine(number - 1, len(steps))
        for micro in step:
            if isinstance(model, FSDPModule):
                before_micro_batch(model, micro is step[-1], *kept)
            losses, metrics = loss(micro.numbers)
            shares = torch.tensor(micro.shares, device=losses.device)
            # FSDP averages gradients over the processes; times their number that is the sum of all shares.
            (losses @ shares * world()).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += (values.detach() @ shares).item()
            sums["tokens"] += micro.tokens
            sums["batch"] += sum(share > 0 for share in micro.shares)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

        grad_norm = (grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm).item()
        metrics = dict(zip(sums, sum_over_processes(sums.values())))
        num_tokens += int(metrics.pop("tokens"))
        check(metrics["loss"], grad_norm, number, first_loss)
        line = dict(step=number, steps=len(steps), batch=int(metrics.pop("batch")), **metrics,
                    learning_rate=learning_rate, grad_norm=grad_norm, num_tokens=num_tokens)
        log(**line)
        text = f"loss {{loss:.4f}}  {shown}grad_norm {{grad_norm:.2f}}  lr {learning_rate:.2e}".format(**line)
        bar.set_postfix_str(text)
        if not sys.stderr.isatty():  # there is no bar
            say(f"step {number}/{len(steps)}  {text}")
        yield number

def mean_loss(step, losses):
    """The mean of losses(numbers) (B,) over a step's global batch."""
    mine = sum((losses(micro.numbers) @ torch.tensor(micro.shares, device=device())).item() for micro in step)
    return sum_over_processes([mine])[0]

def check(loss, grad_norm, number, first_loss):
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            raise Problem(f"the {name} of step {number} is {value}; try a smaller learning rate")
    if number == 1 and first_loss is not None:
        tolerance = (1e-3 if torch.cuda.is_available() else 1e-6) * max(1, abs(first_loss))  # bf16, fp32
        if abs(loss - first_loss) > tolerance:
            raise Problem(f"the loss of step 1 is {loss:.7f} and not {first_loss:.7f}: "
                          "the policy differs from its own reference")

def cosine(step, steps, warmup=0.1):
    """Factor of the learning rate in step 0 … steps−1: linear warm-up, then half a cosine towards 0."""
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))

def sum_over_processes(values):
    """Numbers -> a list of as many, each the sum over all processes."""
    vector = torch.tensor(list(values), dtype=torch.float64, device="cpu")
    if world() > 1:
        dist.all_reduce(vector)
    return vector.tolist()

# ---------------------------------------------------------------- FSDP2
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

def shard(root, recompute=False):
    """FSDP2 over all processes. `root` wraps a model (root.model); only root's forward fires FSDP's hooks.
    recompute: gradient checkpointing, a layer's activations are computed again in the backward pass."""
    if not dist.is_initialized():
        wrap(root, recompute)
        return root.to(device())
    weights = root.state_dict() if rank() == 0 else {}
    buffers = [b.clone() if rank() == 0 else torch.empty_like(b, device="cpu") for b in root.buffers()]
    root.to("meta")
    root.model.tie_weights()
    mesh = init_device_mesh(device().type, (world(),))
    wrap(root, recompute, mesh, BF16 if device().type == "cuda" else MixedPrecisionPolicy())
    root.to_empty(device=device())
    set_model_state_dict(root, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))
    for ours, rank0s in zip(root.buffers(), buffers):  # RoPE's frequencies are in no checkpoint
        dist.broadcast(rank0s, 0)
        ours.copy_(rank0s)
    return root

def decoder_layers(model):
    return next(module for module in decoder(model).modules() if isinstance(module, torch.nn.ModuleList))

def wrap(root, recompute, mesh=None, precision=None):
    """Make the layers recompute and, with a mesh, shard all parameters."""
    layers = decoder_layers(root.model)
    if recompute:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if mesh:
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(root, mesh=mesh, mp_policy=precision)  # embedding, norm, head: one group, tied or not

def kept_whole(parameters, memory, processes, width):
    """Whether each process keeps the whole gradient, and the whole weights, between the micro-batches of a
    step: (bool, bool). That spares communication and costs memory. A parameter's shard is 16 bytes (fp32:
    weight, gradient, Adam's two moments) over the number of processes, its whole gradient 4 more, its whole
    weight `width`. Two thirds of the memory may go into that; the rest is for activations. 8 B on eight GPUs
    of 80 GB: the gradient, which makes it 48 GB, and not the weights, which would make it 64 of 86.
    """
    room = memory * 2 / 3 / parameters - 16 / processes
    return 4 <= room, 4 + width <= room

def before_micro_batch(model, last, keep_gradient, keep_weights):
    """Have a sharded model keep what `kept_whole` says, until the last micro-batch of a step."""
    model.set_requires_gradient_sync(last or not keep_gradient)
    if keep_weights:
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(last)

"""The one training loop of the project, and the sharding of models by FSDP2.

dpo.py, reward.py and toy.py give the loop their losses. On GPUs the weights are fp32 and the computation is
bf16. On CPUs all is fp32. A single process on a CPU does not shard.

The loss of a step is the mean over its global batch, Σ_i loss_i / batch, over the rows i of all processes.
Each process adds up loss_i · share, with share = 1 / batch, over its micro-batches, which gives the same sum
in pieces. So the size of micro-batches and the number of processes change nothing but rounding.

Left out on purpose: other optimisers, weight decay, CPU offload, resuming within an epoch.
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
    numbers: list  # which rows are in this forward pass of this process
    share: float   # the weight of each row in the mean over the global batch; 0 if this is a filler
    tokens: int    # how many tokens the rows have; 0 if this is a filler

def steps_of(lengths, batch, micro_batch, seed, epochs=1, counts=None):
    """Plan a training: return a list of steps, each of which is the list of this process's micro-batches.

    lengths: the length of each row in tokens. batch: rows per step over all processes. micro_batch: rows per
    forward pass and process. counts: a number per row, if the mean is not over rows but, say, over tokens.

    All processes shuffle alike, and no row is left out: the last batch of an epoch may be smaller. All must
    have the same number of micro-batches, because collectives wait for each other. So a process that has no
    rows left gets a filler: a row of another process, with share 0."""
    counts, steps = counts or [1] * len(lengths), []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        for at in range(0, len(order), batch):
            rows = sorted(order[at:at + batch].tolist(), key=lambda i: (-lengths[i], i))  # like with like
            step, share = [], 1 / sum(counts[i] for i in rows)
            for first in range(0, len(rows), micro_batch * world()):
                group = rows[first:first + micro_batch * world()]
                mine = group[rank()::world()]
                step.append(MicroBatch(mine, share, sum(lengths[i] for i in mine)) if mine
                            else MicroBatch(group[:1], 0.0, 0))
            steps.append(step)
    return steps

def optimise(model, steps, loss, *, lr, log, shown="", first_loss=None):
    """Train the model by AdamW in the steps of `steps_of`. Yield the number of each step, from 1, after it.

    loss(numbers) -> losses (B,), {metric: (B,)} of the rows with these numbers, one micro-batch. log: a
    function that takes the metrics of a step (run.open_log). shown: a format string with the metrics to
    print for each step. first_loss: the mean loss that the first step must have, or None."""
    if isinstance(model, FSDPModule):
        model.reshard()  # computing reference log-probabilities has left the root's parameters gathered
        parameters = sum(p.numel() for p in model.parameters())
        kept = kept_whole(parameters, on_rank0(memory), world(), 2 if device().type == "cuda" else 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    if len(steps) < 10:
        say(f"WARNING: only {len(steps)} optimiser steps. A smaller --batch gives more (in mt.py: "
            "--policy_batch and --rm_batch).")
    num_tokens, bar = 0, tqdm(steps, "steps", disable=quiet())
    for number, step in enumerate(bar, 1):
        sums, learning_rate = defaultdict(float), lr * cosine(number - 1, len(steps))
        for micro in step:
            if isinstance(model, FSDPModule):
                before_micro_batch(model, micro is step[-1], *kept)
            losses, metrics = loss(micro.numbers)
            # FSDP takes the mean of the processes' gradients. The factor world() turns it into their sum.
            (weighted_sum(losses, micro) * world()).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += weighted_sum(values.detach(), micro).item()
            sums["tokens"] += micro.tokens
            sums["batch"] += len(micro.numbers) * (micro.share > 0)
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
        if not sys.stderr.isatty():  # no terminal, so no progress bar
            say(f"step {number}/{len(steps)}  {text}")
        yield number

def weighted_sum(values, micro):
    """(B,) values of the rows of a micro-batch -> what they add to the mean over the global batch."""
    return values @ torch.full_like(values, micro.share)

def mean_loss(step, losses):
    """The mean of losses(numbers) (B,) over the global batch of a step."""
    return sum_over_processes([sum(weighted_sum(losses(micro.numbers), micro).item() for micro in step)])[0]

def check(loss, grad_norm, number, first_loss):
    """Stop if the training diverged, or if the first loss shows that the reference is not the policy."""
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            raise Problem(f"the {name} of step {number} is {value}; try a smaller learning rate")
    if number == 1 and first_loss is not None:
        tolerance = (1e-3 if torch.cuda.is_available() else 1e-6) * max(1, abs(first_loss))  # bf16, fp32
        if abs(loss - first_loss) > tolerance:
            raise Problem(f"the loss of step 1 is {loss:.7f} and not {first_loss:.7f}: the policy has "
                          "other log-probabilities in training than as its own reference")

def cosine(step, steps, warmup=0.1):
    """The factor of the learning rate in step 0 … steps−1: linear warm-up, then half a cosine towards 0."""
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))

def sum_over_processes(values):
    """A list of numbers -> for each of them the sum over all processes."""
    vector = torch.tensor(list(values), dtype=torch.float64, device="cpu")
    if world() > 1:
        dist.all_reduce(vector)
    return vector.tolist()

# ---------------------------------------------------------------- FSDP2
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

def shard(root, recompute=False):
    """Shard a model over all processes by FSDP2. `root` is a module with the model as root.model. Only root's
    forward fires FSDP's hooks, so never call the model itself. recompute: gradient checkpointing, so the
    backward pass computes the activations of each layer again."""
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
    for ours, rank0s in zip(root.buffers(), buffers):  # such as RoPE's frequencies, which no state dict has
        dist.broadcast(rank0s, 0)
        ours.copy_(rank0s)
    return root

def decoder_layers(model):
    return next(module for module in decoder(model).modules() if isinstance(module, torch.nn.ModuleList))

def wrap(root, recompute, mesh=None, precision=None):
    """Have each layer recompute its activations, if asked to, and shard each layer, if there is a mesh."""
    layers = decoder_layers(root.model)
    if recompute:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if mesh:
        for module in (*layers, root):  # root: embedding, norm and head, which may be tied
            fully_shard(module, mesh=mesh, mp_policy=precision)

def kept_whole(parameters, memory, processes, width):
    """Decide whether each process keeps the full gradient, and the full weights, between the micro-batches of
    one step. Keeping them saves communication and costs memory. Returns (keep_gradient, keep_weights).

    Sharded, a parameter takes 16 bytes (weight, gradient, Adam's two moments in fp32) over the number of
    processes. Its full gradient takes 4 more, its full weight `width`. Two thirds of memory may be taken."""
    room = memory * 2 / 3 / parameters - 16 / processes
    return 4 <= room, 4 + width <= room

def before_micro_batch(model, last, keep_gradient, keep_weights):
    """Tell FSDP to keep gradient and weights whole after this micro-batch, unless it is the step's last."""
    model.set_requires_gradient_sync(last or not keep_gradient)
    if keep_weights:
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(last)

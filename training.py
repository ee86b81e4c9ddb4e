"""The one optimiser loop: global batches, schedule, clipping, metrics.

dpo.py and reward.py hand it a loss, and so does the embedded task for the supervised training of its base
policy. The mean is over the global batch, so results don't depend on the number of processes or on the size
of micro-batches.

Left out on purpose: other optimisers, weight decay.
"""
import json
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import run
from data import Problem, quiet
from parallel import before_micro_batch, device, from_rank0, held_whole, memory, rank, world


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


def optimise(model, steps, loss, *, lr, log, shown="", first_loss=None, resume=None):
    """Take the steps of `steps_of` by AdamW; yields the number of each, from 1, when it is done.

    loss(numbers) -> losses (B,), {metric: (B,)}: of the rows with these numbers. first_loss: what the mean
    loss of the first step must be. shown: what the bar says beside it. resume: (folder, N): the
    state is kept there every N steps (0: never), and taken up again if there is one.
    """
    sharded = isinstance(model, FSDPModule)
    if sharded:
        model.reshard()  # a forward pass before, of a reference, leaves the root's parameters gathered
        held = held_whole(sum(p.numel() for p in model.parameters()), from_rank0(memory()), world(),
                          2 if device().type == "cuda" else 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    folder, every = resume or (None, 0)
    lines = restore(folder, model, optimizer) if folder else []
    for line in lines:
        log(**line)
    bar = tqdm(steps[len(lines):], "steps", len(steps), initial=len(lines), disable=quiet())
    for number, step in enumerate(bar, len(lines) + 1):
        sums = defaultdict(float)
        for micro in step:
            if sharded:
                before_micro_batch(model, micro is step[-1], *held)
            losses, metrics = loss(micro.numbers)
            shares = torch.tensor(micro.shares, device=losses.device)
            # FSDP averages gradients over processes; times their number that is the sum, the global mean
            (losses @ shares * world()).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += (values.detach() @ shares).item()
            sums["tokens"] += micro.tokens
            sums["batch"] += sum(share > 0 for share in micro.shares)
        metrics = total(sums)
        num_tokens = int(metrics.pop("tokens")) + (lines[-1]["num_tokens"] if lines else 0)
        check_loss(metrics["loss"], number, first_loss)

        learning_rate = lr * cosine(number - 1, len(steps))
        grad_norm = clip(model)
        if not math.isfinite(grad_norm):
            raise Problem(f"the grad_norm of step {number} is {grad_norm}; try a smaller learning rate")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        lines.append(dict(step=number, steps=len(steps), batch=int(metrics.pop("batch")), **metrics,
                          learning_rate=learning_rate,
                          grad_norm=grad_norm, num_tokens=num_tokens))
        figures = f"loss {{loss:.4f}}  {shown}grad_norm {{grad_norm:.2f}}  lr {{learning_rate:.2e}}".format(
            **lines[-1])
        bar.set_postfix_str(figures)
        log(f"step {number}/{len(steps)}  {figures}", **lines[-1])
        yield number
        if every and number % every == 0 and number < len(steps):
            keep(folder, model, optimizer, lines)


def mean(step, losses):
    """The mean of losses(numbers) (B,) over a step's global batch."""
    return total({"": sum((losses(micro.numbers) @ torch.tensor(micro.shares, device=device())).item()
                          for micro in step)})[""]


def check_loss(loss, number, first_loss):
    if not math.isfinite(loss):
        raise Problem(f"the loss of step {number} is {loss}; try a smaller learning rate")
    if number == 1 and first_loss is not None:
        tolerance = 1e-3 if torch.cuda.is_available() else 1e-6  # of bf16 and of fp32
        if abs(loss - first_loss) > tolerance * max(1, abs(first_loss)):
            raise Problem(f"the loss of step 1 is {loss:.7f} and not {first_loss:.7f}: "
                          "the policy differs from its own reference")


# ---------------------------------------------------------------- going on within an epoch
def resume_of(path):
    """The folder of what is kept while the result `path` is made."""
    return path.with_name(f".{path.name}.resume")


def keep(folder, model, optimizer, lines):
    """Keep this process's part of the weights and of Adam's moments, and the log so far; the last one only.
    Safetensors and JSON: torch's distributed checkpoints would have to be unpickled."""
    older = list(folder.glob("*")) if folder.exists() else []
    with run.writing(folder / str(len(lines))) as temporary:
        temporary.mkdir(exist_ok=True)
        save_file(local_state(model, optimizer), temporary / f"{rank()}-of-{world()}.safetensors")
        if rank() == 0:
            (temporary / "log.json").write_text(json.dumps(lines))
    run.remove_all(*older)


def restore(folder, model, optimizer):
    """Take up what `keep` left, if there is any by as many processes; returns the log's lines so far."""
    found = [path for path in folder.glob("[0-9]*") if (path / f"0-of-{world()}.safetensors").exists()]
    found = from_rank0(max(found, key=lambda path: int(path.name), default=None))
    if not found:
        return []
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    state = load_file(found / f"{rank()}-of-{world()}.safetensors")
    for name, tensor in local_state(model, optimizer).items():
        tensor.copy_(state[name])
    return json.loads((found / "log.json").read_text())


@torch.no_grad()
def local_state(model, optimizer):
    """{name: tensor}: this process's own shards, no copies."""
    state = {}
    for number, p in enumerate(model.parameters()):
        for name, tensor in {"weight": p.detach(), **optimizer.state[p]}.items():
            state[f"{number}.{name}"] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return state


# ---------------------------------------------------------------- schedule and sums
def cosine(step, steps, warmup=0.1):
    """Factor of the learning rate in step 0 … steps−1: linear warm-up, then half a cosine towards 0."""
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def clip(model, max_norm=1.0):
    """Clip the gradient to max_norm; returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def total(values):
    """{name: float}, each summed over all processes."""
    vector = torch.tensor(list(values.values()), dtype=torch.float64, device="cpu")
    if world() > 1:
        dist.all_reduce(vector)
    return dict(zip(values, vector.tolist()))

"""Estimates the hours, the memory and the disk that a run of mt.py takes, before it starts.

    python -m evals.plan --policy POLICY --rm RM --prompts prompts.jsonl --gpus 8 --gpu h100

It takes the flags of mt.py and two of its own, --gpus and --gpu. Without these two and without a GPU it plans
for one process on this CPU, whose speed it measures. It reads the models' configs and tokenizers and the
prompts, but no weights, and writes nothing. The formulas are for Llamas and models like them.
tests/test_plan.py compares the memory of training with that of a training step on tensors without data.

Left out on purpose: the FLOPs of attention itself (5% at 2,048 tokens), communication between GPUs (it is
assumed to overlap with computation), and mixtures of experts (every token is counted for all experts).
"""
import functools
import shutil
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from timeit import timeit
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import mt
from common import models, parallel, run
from common.data import Problem, read_prompts
from common.packing import LOGITS
from common.parallel import say
from common.run import option
from common.training import decoder_layers, kept_whole
from sampler import PREFILL, block_size

POLICY, RM = AutoModelForCausalLM, AutoModelForSequenceClassification
GIB = 2**30
GPUS = {  # the makers' figures: GiB, dense bf16 FLOP/s, bytes/s
    "a10g": (22, 70e12, 0.6e12), "4090": (24, 165e12, 1.01e12), "l40s": (45, 362e12, 0.86e12),
    "a100": (80, 312e12, 2.0e12), "h100": (80, 989e12, 3.35e12), "h200": (140, 989e12, 4.8e12),
    "b200": (179, 2250e12, 7.7e12)}
# These are assumed, not measured. The first of two numbers gives the shortest time, the second the longest.
ANSWER = 0.25, 0.5   # mean length of an answer, as a share of --max_new_tokens
DECODING = 0.5, 0.2  # share of the bandwidth that decoding reaches
COMPUTE, ON_CPU = (0.5, 0.3), (0.8, 0.3)  # share of the FLOP/s that everything else reaches, on GPUs and CPUs
USABLE = 0.92        # share of the memory; CUDA's context, fragmentation and other programs take the rest

def size_of(config, kind, width=2):
    """Return the numbers of parameters and the widths of a config's model, which is made without weights."""
    with torch.device("meta"):
        model = kind.from_config(config)
    config, policy, layers = config.get_text_config(), kind is POLICY, decoder_layers(model)
    params, layer = (sum(p.numel() for p in module.parameters()) for module in (model, layers[0]))
    embedding, heads = model.get_input_embeddings().weight.numel(), config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return SimpleNamespace(
        params=params, layers=len(layers), layer=layer, width=width,  # bytes of a number in forward passes
        root=params - len(layers) * layer,  # outside the layers
        head=embedding * policy,  # over the vocabulary; a reward model has none
        matrices=params - embedding * (not policy or not config.tie_word_embeddings),  # that cost FLOPs
        hidden=config.hidden_size, inner=inner, query=heads * head_dim, key=key,
        passing=width * (3 * inner + 4 * config.hidden_size),  # bytes of a token in a layer, if none is saved
        token=2 * width * key * len(layers))  # bytes in the cache: keys and values

# ---------------------------------------------------------------- memory of a GPU: {part: bytes}
def rows_of(size, rows, tokens, memory):
    """Return how many of `rows` responses of `tokens` tokens fit into sampler.cache_tokens; at least 1."""
    return min(rows, max(1, int(memory - size.width * size.params) // 2 // size.token // tokens))

def sampling(size, rows, prompt, answer):
    """Return the memory of decoding `rows` responses together, each to a different prompt (sampler.Slots)."""
    return {"weights": size.width * size.params, "cache": rows * (prompt + answer) * size.token,
            "prompts": prompt * (rows * size.token + PREFILL * size.passing),
            "logits": 6 * 4 * rows * size.head / size.hidden}  # fp32: probabilities, sums, comparisons

def scoring(size, prompts, prompt, answer, samples):
    """Return the memory of scoring `prompts` prompts with `samples` answers each (reward.score_answers)."""
    tokens = prompts * (prompt + samples * answer)
    return {"weights": size.width * size.params, "activations": tokens * size.passing}

def train_step(size, gpus, pairs, prompt, answer, recompute, memory):
    """Return the peak memory of a backward pass over `pairs` pairs (training.optimise, training.wrap).

    Weights, gradients and Adam's moments are fp32 shards, and training.kept_whole says what is kept whole. In
    the layers, FSDP gathers the root, the layer at work and the next one in bf16, and holds gradients in fp32
    until they are reduced. For each token a layer saves two norms (each the input in fp32 and two results),
    four results of the MLP and one of attention. For each token of each chat it saves queries, keys, values
    and the result of attention. After the layers come the root's gradients in bf16 and fp32. The peak is
    either in the layers or after them. On a CPU all is fp32, and the one process gathers nothing.
    """
    width, fsdp, tokens = size.width, size.width == 2, pairs * (prompt + 2 * answer)
    saved = width * (tokens * ((4 + 8 / width) * size.hidden + 4 * size.inner + size.query)
                     + pairs * 2 * (prompt + answer) * 2 * (size.query + size.key))
    kept = saved + width * size.layers * size.hidden * tokens if recompute else size.layers * saved
    shard, (gradient, weights) = 4 * size.params / gpus, kept_whole(size.params, memory, gpus, 2)
    within = {"gathered": fsdp * (4 * size.layer + (0 if weights else 2 * size.root + 4 * size.layer)),
              "activations": kept + tokens * width * (3 * size.inner + size.hidden),
              "logits": (width * size.head + 10 * LOGITS) * (size.head > 0)}  # the head's gradient, and tiles
    return {"weights": shard + fsdp * 2 * size.params * weights, "Adam": 2 * shard,
            "gradients": 4 * size.params if gradient else shard} | max(
        within, {"gathered": fsdp * (4 if weights else 6) * size.root}, key=lambda parts: sum(parts.values()))

# ---------------------------------------------------------------- time
def phases(o, policy, rm, prompts, prompt, end):
    """Return [(phase, times in a run, rows, tokens, FLOPs, hours)]; the last four are for doing it once.

    prompts: how many there are. prompt: mean tokens of one. end: 0 takes the first number of each assumption,
    1 the second. FLOPs are 2 for each parameter and token forward and 4 backward. To decode a token for all
    rows, weights and cache are read once. In every block one answer is assumed to have --max_new_tokens
    tokens, and to be decoded alone once the others are done.
    """
    memory, flops, bandwidth, share = figures_of(o.gpu)
    flops, bandwidth, answer = flops * share[end], bandwidth * DECODING[end], o.max_new_tokens * ANSWER[end]

    def compute(name, times, size, passes, rows, tokens):
        work = 2 * passes * size.matrices * rows * tokens
        return name, times, rows, rows * tokens, work, work / flops / o.gpus / 3600

    def sample(name, times, prompts, each):
        _, _, _, _, work, hours = compute(name, times, policy, 1, prompts, prompt + each * answer)
        rows = rows_of(policy, min(o.sample_batch, prompts * each), prompt + o.max_new_tokens, memory * GIB)
        block = block_size(prompts, o.sample_batch / each)
        steps = block * each / rows * answer + o.max_new_tokens - answer
        steps *= ceil(ceil(prompts / block) / o.gpus)
        read = policy.width * policy.params + rows * (prompt + answer / 2) * policy.token
        hours += steps * read / bandwidth / 3600
        return name, times, prompts * each, prompts * each * answer, work, hours

    third = (prompts - o.select_prompts) // 3
    e, m, forward = 2 * o.rounds, o.rounds * o.update_rm, 1 + o.recompute
    select = e * o.select * (ceil(ceil(third / o.policy_batch) / o.save_every) + 1)  # 1: the policy before
    return [phase for phase in (
        sample("E: sample", e, third, o.samples),
        compute("E: score", e, rm, 1, third, prompt + o.samples * answer),
        compute("E: DPO", e, policy, forward + 3, third, prompt + 2 * answer),  # 1 for the reference
        sample("E: select, sample", select, max(1, o.select_prompts), 1),
        compute("E: select, score", select, rm, 1, o.select_prompts, prompt + answer),
        sample("M: sample", 2 * m, third, 1),
        compute("M: score", 2 * m, rm, 1, third, prompt + answer),
        compute("M: Bradley-Terry", m, rm, forward + 2, 2 * third, prompt + 2 * answer)) if phase[1]]

# ---------------------------------------------------------------- the plan
@functools.cache
def figures_of(gpu):
    """Return (GiB, FLOP/s, bytes/s, shares of the FLOP/s) of a GPU in the table, or of this machine, called
    "cpu": it multiplies fp32 matrices and copies memory for a second. Compared with SmolLM2-135M-Instruct on
    one core of a busy machine: DPO reached 28 to 75 of 98 GFLOP/s. Sampling made 17, 34 and 103 tokens/s with
    1, 4 and 40 rows, where this plan gives 8-21, 18-46 and 48-125."""
    return (*GPUS[gpu], COMPUTE) if gpu in GPUS else (
        parallel.memory() / GIB,
        20 * 2 * 1024**3 / timeit("a @ a", "import torch; a = torch.ones(1024, 1024)", number=20),
        20 * 2 * 2**27 / timeit("a.copy_(b)", "import torch; a, b = torch.ones(2, 2**25)", number=20), ON_CPU)

@dataclass
class Options(mt.Options):
    recompute: bool = option(True, "recompute activations: slower, less memory; false for this CPU")
    gpus: int = option(None, "GPUs of all nodes together (default: those here, or 8)", group="the plan")
    gpu: str = option("", ", ".join(GPUS) + " (default: this machine's, or h100)")

def main():
    """Print the plan. Raise a Problem if something does not fit."""
    here = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else "h100"
    defaults = dict(gpu=next((gpu for gpu in GPUS if gpu in here), here), gpus=torch.cuda.device_count() or 8)
    o = run.parse(Options)
    if cpu := not (o.gpu or o.gpus or torch.cuda.is_available()):
        defaults = dict(gpu="cpu", gpus=1, recompute=False)  # mt.py does not recompute here
    o = run.parse(Options, **defaults)
    if not (o.policy and o.rm and o.prompts and (cpu or o.gpu in GPUS)):
        raise Problem(f"a plan needs --policy, --rm, --prompts and a --gpu of {', '.join(GPUS)}")
    configs = models.config_of(o.policy), models.config_of(o.rm)
    policy, rm = map(size_of, configs, (POLICY, RM), 2 * [4 if cpu else 2])
    prompts, _ = models.prompts_that_fit(o.rm, read_prompts(o.prompts)[0], o.max_new_tokens)
    prompts, lengths = models.prompts_that_fit(o.policy, prompts)
    if (count := len(prompts)) < o.select_prompts + 3:
        raise Problem(f"{o.prompts}: {count} prompts; --select_prompts {o.select_prompts} and three subsets "
                      f"need at least {o.select_prompts + 3}; --select_prompts {count // 6 or 1} fits")
    if models.files_of(o.rm) and "score.weight" not in models.shapes_of(o.rm):
        say(f"{o.rm} has no reward head yet; train one first: python reward.py --model {o.rm} --pairs …")
    mean, longest = float(np.mean(lengths)), max(lengths)
    machine = f"this CPU, {torch.get_num_threads()} threads" if cpu else f"{o.gpus} x {o.gpu}"
    say(f"{machine}; policy {policy.params / 1e9:.2f} B, reward model {rm.params / 1e9:.2f} B; "
        f"{count:,} prompts of {mean:.0f} tokens, the longest {longest:,}\n")
    say_hours(o, *(phases(o, policy, rm, count, mean, end) for end in (0, 1)))

    answer = min(o.max_new_tokens, models.context_of(o.policy) - longest)
    prompt = max(1, min(longest, o.max_length - answer))
    pair = prompt, min(answer, o.max_length - prompt)  # the longest pair that is not left out
    memory = figures_of(o.gpu)[0] * GIB
    o.sample_batch = rows_of(policy, o.sample_batch, longest + answer, memory)  # as the sampler does

    def training(size, recompute=o.recompute):
        return lambda pairs, gpus: train_step(size, gpus, pairs, *pair, recompute, memory)
    wrong = say_memory(o, {
        "sampling": ("sample_batch", lambda rows, gpus: sampling(policy, rows, longest, answer)),
        "scoring": ("score_batch", lambda prompts, gpus: scoring(rm, prompts, longest, answer, o.samples)),
        "DPO": ("micro_batch", training(policy)), "Bradley-Terry": ("micro_batch", training(rm))})
    other = sum(training(policy, not o.recompute)(o.micro_batch, o.gpus).values())
    say(f"DPO with --recompute {str(not o.recompute).lower()}: {other / GIB:.1f} GiB")
    stored = (size.width * size.params for size in (policy, rm))  # in the precision of forward passes
    disk = disk_needed(o, *stored, ceil((count - o.select_prompts) // 3 / o.policy_batch))
    out = Path(o.out or "runs").absolute()
    free = shutil.disk_usage(next(place for place in (out, *out.parents) if place.exists())).free
    say(f"disk: up to {disk / 1e9:.0f} GB for models, {free / 1e9:.0f} GB are free here; saving one takes "
        f"another {(8 if cpu else 6) * policy.params / 1e9:.0f} GB of CPU memory{' on node 0' * (not cpu)}")
    if wrong := wrong + ["the disk"] * (disk > free):
        raise Problem("this does not fit: " + "; ".join(wrong))

def disk_needed(o, policy, rm, steps):
    """Bytes on disk for a run's models. policy, rm: bytes of one; steps: optimiser steps of an E-step."""
    checkpoints = steps // o.save_every + 1 if o.select else 1
    return o.rounds * (2 * policy + o.update_rm * rm) + checkpoints * policy

def span(low, high):
    """Write a range of hours as text; in minutes if it begins below 0.1 hours."""
    return f"{60 * low:.2g}-{60 * high:.2g} min" if low < 0.1 else f"{low:.2f}-{high:.2f} h"

def say_hours(o, short, long):
    """Print the time of each phase and of the run. short, long: `phases` with the ends 0 and 1."""
    _, flops, bandwidth, share = figures_of(o.gpu)
    unit, k, t, g = (1e3, *"kTG") if o.gpu == "cpu" else (1e6, *"MPT")  # k tokens, TFLOP, GFLOP/s, GB/s
    at = f"{share[1]:.0%}-{share[0]:.0%} of {flops / unit / 1e6:.0f} {g}FLOP/s"
    decoding = f", {DECODING[1]:.0%}-{DECODING[0]:.0%} of {bandwidth / unit / 1e6:.3g} {g}B/s"
    say(f"assumed: answers of {ANSWER[0] * o.max_new_tokens:g}-{ANSWER[1] * o.max_new_tokens:g} tokens. "
        "A line's figures are for doing the phase once.\n"
        f"{'phase':19}times    rows    {k} tokens         {t}FLOP          time  speed, assumed")
    for (name, times, rows, *low), (*_, tokens, work, hours) in zip(short, long):
        ranges = (f"{low[0] / unit:.1f}-{tokens / unit:.1f}",
                  f"{low[1] / unit / 1e9:.0f}-{work / unit / 1e9:.0f}", span(low[2], hours))
        say("{:19}{:5}{:8}{:>12}{:>14}{:>14}  ".format(name, times, rows, *ranges)
            + at + decoding * name.endswith("sample"))
    low, high = (sum(times * hours for _, times, *_, hours in end) for end in (short, long))
    total = f", {span(o.gpus * low, o.gpus * high)} of GPU time, if communication overlaps with computation"
    say(f"the run: {span(low, high)}{total * (o.gpu != 'cpu')}\n")

def say_memory(o, needs):
    """Print the memory of each phase, and return what to change where it does not fit.
    needs: {phase: (the flag of its batch size, a function from (batch, GPUs) to {part: bytes})}."""
    memory, wrong, cpu = figures_of(o.gpu)[0], [], o.gpu == "cpu"
    say(f"GiB of {'this machine' if cpu else 'one GPU'}, for the longest prompts and answers. Of its "
        f"{memory:.4g}, {USABLE * memory:.1f} are assumed to be usable.")
    for name, (flag, need) in needs.items():
        def fits(batch, gpus=o.gpus, need=need):
            return sum(need(batch, gpus).values()) <= USABLE * memory * GIB
        batch, most = getattr(o, flag), max(filter(fits, range(1, 513)), default=0)
        parts = need(batch, o.gpus)
        say(f"{name:13}{sum(parts.values()) / GIB:7.1f} with --{flag} {batch}, up to {most} fit: "
            + " + ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size))
        if not fits(batch):
            gpus = next((gpus for gpus in 2 ** np.arange(11) if not cpu and fits(1, gpus)), None)
            wrong.append(f"{name} needs " + (f"--{flag} {most}" if most else f"{gpus} such GPUs" if gpus else
                         "more memory" if cpu else "GPUs with more memory, as each holds a whole model"))
    return wrong

if __name__ == "__main__":
    run.launch(main)

"""What a run of mt.py takes, before it starts: hours, memory, disk; from configs, prompts and flags alone.

    python -m evals.plan --policy POLICY --rm RM --prompts prompts.jsonl --gpus 8 --gpu h100

It takes the flags of mt.py besides its own two. No weights are read and nothing is written. The formulas are
for Llamas and models like them; those for the memory of training are held to a training step on tensors
without numbers by tests/test_plan.py.

Left out on purpose: the FLOPs of attention itself (5% at 2,048 tokens), networks (taken to hide behind work),
mixtures of experts (all are counted for every token).
"""
import shutil
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import mt
from common import models, run
from common.data import Problem, read_prompts
from common.packing import LOGITS
from common.parallel import say
from common.run import option
from common.training import decoder_layers, kept_whole
from sampler import PREFILL, block_size

POLICY, RM = AutoModelForCausalLM, AutoModelForSequenceClassification
GIB = 2**30
GPUS = {  # GiB, dense bf16 FLOP/s, bytes/s: the makers' figures
    "a10g": (22, 70e12, 0.6e12), "4090": (24, 165e12, 1.01e12), "l40s": (45, 362e12, 0.86e12),
    "a100": (80, 312e12, 2.0e12), "h100": (80, 989e12, 3.35e12), "h200": (140, 989e12, 4.8e12),
    "b200": (179, 2250e12, 7.7e12)}
# assumed, not measured; the first of each makes the short end of a range
ANSWER = 0.25, 0.5   # mean length of an answer / --max_new_tokens
DECODING = 0.5, 0.2  # share of the bandwidth
COMPUTE = 0.5, 0.3   # share of the FLOP/s
USABLE = 0.92        # share of the memory; the rest is CUDA's context, and gaps

def size_of(config, kind):
    """Numbers of parameters and widths, of the config's model made without weights."""
    with torch.device("meta"):
        model = kind.from_config(config)
    config, policy, layers = config.get_text_config(), kind is POLICY, decoder_layers(model)
    params, layer = (sum(p.numel() for p in module.parameters()) for module in (model, layers[0]))
    embedding, heads = model.get_input_embeddings().weight.numel(), config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = (getattr(config, "num_key_value_heads", None) or heads) * width
    return SimpleNamespace(
        params=params, layers=len(layers), layer=layer,
        root=params - len(layers) * layer,  # outside the layers
        head=embedding * policy,  # over the vocabulary
        matrices=params - embedding * (not policy or not config.tie_word_embeddings),  # that tokens multiply
        hidden=config.hidden_size, inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        query=heads * width, key=key,
        token=2 * 2 * key * len(layers))  # bytes in the cache: keys and values in bf16

# ---------------------------------------------------------------- memory of a GPU: {part: bytes}
def rows_of(size, rows, tokens, memory):
    """As many of `rows` responses of so many tokens as sampler.cache_tokens has room for, at least one."""
    return min(rows, max(1, (memory - 2 * size.params) // 2 // size.token // tokens))

def sampling(size, rows, prompt, answer):
    """`rows` responses in flight, each to a prompt of its own, of so many tokens (sampler.Slots)."""
    return {"weights": 2 * size.params, "cache": rows * (prompt + answer) * size.token,
            "prompts": rows * prompt * size.token + PREFILL * prompt * (6 * size.inner + 8 * size.hidden),
            "logits": 6 * 4 * rows * size.head / size.hidden}  # fp32: probabilities, sums, what compares them

def scoring(size, prompts, prompt, answer, samples):
    """A forward pass over so many prompts with `samples` answers each (reward.score_answers)."""
    tokens = prompts * (prompt + samples * answer)
    return {"weights": 2 * size.params, "activations": tokens * (6 * size.inner + 8 * size.hidden)}

def train_step(size, gpus, pairs, prompt, answer, recompute, memory):
    """The backward pass over `pairs` pairs of so many tokens (training.optimise, training.wrap).

    States are fp32 shards, beside what training.kept_whole keeps. Gathered are, in bf16, the root, a layer at
    work and the next one, and, in fp32, gradients on their way. A layer saves for each token two norms (input
    in fp32, two results), four results of the MLP and one of attention; for each token of each chat queries,
    keys, values and attention's result. The pass ends with the root's gradients in bf16 and fp32.
    """
    tokens = pairs * (prompt + 2 * answer)
    saved = (tokens * (16 * size.hidden + 8 * size.inner + 2 * size.query)
             + pairs * 2 * (prompt + answer) * 4 * (size.query + size.key))
    kept = saved + 2 * size.layers * size.hidden * tokens if recompute else size.layers * saved
    shard, (gradient, weights) = 4 * size.params / gpus, kept_whole(size.params, memory, gpus, 2)
    within = {"gathered": 4 * size.layer + (0 if weights else 2 * size.root + 4 * size.layer),
              "activations": kept + tokens * (6 * size.inner + 2 * size.hidden),
              "logits": (2 * size.head + 10 * LOGITS) * (size.head > 0)}  # the head's gradient, and tiles
    return {"weights": shard + 2 * size.params * weights, "Adam": 2 * shard,
            "gradients": 4 * size.params if gradient else shard} | max(
        within, {"gathered": (4 if weights else 6) * size.root}, key=lambda parts: sum(parts.values()))

# ---------------------------------------------------------------- time
def phases(o, policy, rm, prompts, prompt, end):
    """[(phase, times in a run, rows, tokens, FLOPs, hours)] at the assumptions' end 0 or 1.

    prompts: how many. prompt: mean tokens of one. FLOPs: 2 for each parameter and token forward, 4 backward.
    Decoding a token for all rows reads weights and cache once. Every block has an answer of --max_new_tokens,
    at the end of which the other rows are empty.
    """
    memory, flops, bandwidth = GPUS[o.gpu]
    flops, bandwidth, answer = flops * COMPUTE[end], bandwidth * DECODING[end], o.max_new_tokens * ANSWER[end]

    def compute(name, times, size, passes, rows, tokens):
        work = 2 * passes * size.matrices * rows * tokens
        return name, times, rows, rows * tokens, work, work / flops / o.gpus / 3600

    def sample(name, times, prompts, each):
        _, _, _, _, work, hours = compute(name, times, policy, 1, prompts, prompt + each * answer)
        rows = rows_of(policy, min(o.sample_batch, prompts * each), prompt + o.max_new_tokens, memory * GIB)
        block = min(prompts, block_size(prompts, o.sample_batch / each))
        steps = block * each / rows * answer + o.max_new_tokens - answer
        steps *= ceil(ceil(prompts / block) / o.gpus)
        read = 2 * policy.params + rows * (prompt + answer / 2) * policy.token
        hours += steps * read / bandwidth / 3600
        return name, times, prompts * each, prompts * each * answer, work, hours

    third = (prompts - o.select_prompts) // 3
    e, m, forward = 2 * o.rounds, o.rounds * o.update_rm, 1 + o.recompute
    select = e * o.select * (ceil(ceil(third / o.policy_batch) / o.save_every) + 1)  # checkpoints and before
    return [phase for phase in (
        sample("E: sample", e, third, o.samples),
        compute("E: score", e, rm, 1, third, prompt + o.samples * answer),
        compute("E: DPO", e, policy, forward + 3, third, prompt + 2 * answer),  # 1 is the reference's
        sample("E: select, sample", select, max(1, o.select_prompts), 1),
        compute("E: select, score", select, rm, 1, o.select_prompts, prompt + answer),
        sample("M: sample", 2 * m, third, 1),
        compute("M: score", 2 * m, rm, 1, third, prompt + answer),
        compute("M: Bradley-Terry", m, rm, forward + 2, 2 * third, prompt + 2 * answer)) if phase[1]]

# ---------------------------------------------------------------- the plan
def own_gpu():
    """The name in GPUS of the GPU that is here; where there is none, h100."""
    here = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else "h100"
    return next((gpu for gpu in GPUS if gpu in here), here)

@dataclass
class Options(mt.Options):
    recompute: bool = option(True, "recompute activations: slower, less memory")
    gpus: int = option(torch.cuda.device_count() or 8, "of all nodes together", group="the plan")
    gpu: str = option(own_gpu(), ", ".join(GPUS))

def main():
    """Print the plan; what does not fit is a Problem."""
    o = run.parse(Options)
    if not (o.policy and o.rm and o.prompts and o.gpu in GPUS):
        raise Problem(f"a plan needs --policy, --rm, --prompts and a --gpu of {', '.join(GPUS)}")
    configs = models.check_policy(o.policy), models.check_reward(o.rm)
    policy, rm = map(size_of, configs, (POLICY, RM))
    prompts, _ = models.prompts_that_fit(o.rm, read_prompts(o.prompts)[0], o.max_new_tokens)
    prompts, lengths = models.prompts_that_fit(o.policy, prompts)
    if len(prompts) < o.select_prompts + 3:
        raise Problem(f"{o.prompts}: {len(prompts)} prompts; --select_prompts {o.select_prompts} needs more")
    mean, longest = float(np.mean(lengths)), max(lengths)
    say(f"{o.gpus} x {o.gpu}; policy {policy.params / 1e9:.2f} B, reward model {rm.params / 1e9:.2f} B; "
        f"{len(prompts):,} prompts of {mean:.0f} tokens, the longest {longest:,}\n")
    say_hours(o, *(phases(o, policy, rm, len(prompts), mean, end) for end in (0, 1)))

    answer = min(o.max_new_tokens, models.context_of(o.policy) - longest)
    prompt = max(1, min(longest, o.max_length - answer))
    pair = prompt, min(answer, o.max_length - prompt)  # the largest that is short enough
    memory = GPUS[o.gpu][0] * GIB
    o.sample_batch = rows_of(policy, o.sample_batch, longest + answer, memory)  # as the sampler does

    def training(size, recompute=o.recompute):
        return lambda pairs, gpus: train_step(size, gpus, pairs, *pair, recompute, memory)
    wrong = say_memory(o, {
        "sampling": ("sample_batch", lambda rows, gpus: sampling(policy, rows, longest, answer)),
        "scoring": ("score_batch", lambda prompts, gpus: scoring(rm, prompts, longest, answer, o.samples)),
        "DPO": ("micro_batch", training(policy)), "Bradley-Terry": ("micro_batch", training(rm))})
    other = sum(training(policy, not o.recompute)(o.micro_batch, o.gpus).values())
    say(f"DPO with --recompute {str(not o.recompute).lower()}: {other / GIB:.1f}")
    stored = (size.params * (config.dtype or torch.float32).itemsize
              for size, config in zip((policy, rm), configs))
    disk = models.disk_needed(o, *stored, ceil((len(prompts) - o.select_prompts) // 3 / o.policy_batch))
    out = Path(o.out or "runs").absolute()
    free = shutil.disk_usage(next(place for place in (out, *out.parents) if place.exists())).free
    say(f"disk: models of up to {disk / 1e9:.0f} GB, {free / 1e9:.0f} GB are free here; CPU memory of the "
        f"first node: {6 * policy.params / 1e9:.0f} GB, to save in fp32 and bf16")
    if wrong := wrong + ["the disk"] * (disk > free):
        raise Problem("this does not fit: " + "; ".join(wrong))

def say_hours(o, short, long):
    """short, long: the two ends of `phases`."""
    _, flops, bandwidth = GPUS[o.gpu]
    at = f"{COMPUTE[1]:.0%}-{COMPUTE[0]:.0%} of {flops / 1e12:.0f} TFLOP/s"
    decoding = f", {DECODING[1]:.0%}-{DECODING[0]:.0%} of {bandwidth / 1e12:g} TB/s"
    say(f"answers of {ANSWER[0] * o.max_new_tokens:g}-{ANSWER[1] * o.max_new_tokens:g} tokens assumed\n"
        f"{'phase':19}times    rows    M tokens         PFLOP         hours  each time, assumed")
    for (name, times, rows, *low), (*_, tokens, work, hours) in zip(short, long):
        ranges = (f"{a / unit:.{digits}f}-{b / unit:.{digits}f}" for a, b, unit, digits in
                  zip(low, (tokens, work, hours), (1e6, 1e15, 1), (1, 0, 2)))
        say("{:19}{:5}{:8}{:>12}{:>14}{:>14}  ".format(name, times, rows, *ranges)
            + at + decoding * name.endswith("sample"))
    low, high = (sum(times * hours for _, times, *_, hours in end) for end in (short, long))
    say(f"the run: {low:.1f}-{high:.1f} hours, {o.gpus * low:.0f}-{o.gpus * high:.0f} GPU-hours, where talk "
        "between GPUs hides behind work\n")

def say_memory(o, needs):
    """needs: {phase: (flag of its batch, (batch, GPUs) -> {part: bytes})}. Returns what to change."""
    memory, wrong = GPUS[o.gpu][0], []
    say(f"GiB of a GPU of {memory}, {USABLE * memory:.1f} assumed usable; the longest prompts and answers")
    for name, (flag, need) in needs.items():
        def fits(batch, gpus=o.gpus, need=need):
            return sum(need(batch, gpus).values()) <= USABLE * memory * GIB
        batch, most = getattr(o, flag), max(filter(fits, range(1, 513)), default=0)
        parts = need(batch, o.gpus)
        say(f"{name:13}{sum(parts.values()) / GIB:7.1f} by --{flag} {batch}, up to {most} fit: "
            + " + ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items()))
        if not fits(batch):
            gpus = next((gpus for gpus in 2 ** np.arange(11) if fits(1, gpus)), None)
            wrong.append(f"{name} needs " + (f"--{flag} {most}" if most else f"{gpus} such GPUs" if gpus else
                         "GPUs with more memory, as each holds a whole model"))
    return wrong

if __name__ == "__main__":
    run.launch(main)

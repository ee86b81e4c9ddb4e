"""Sample responses: prompts -> samples.jsonl.

    python sampler.py --model MODEL --prompts prompts.jsonl --out samples.jsonl --samples 5
    torchrun --nproc-per-node 8 sampler.py --model MODEL --prompts prompts.jsonl --out samples.jsonl

A fixed number of rows decodes together, each with a slot in the key-value cache. A prompt is prefilled once
and its keys and values are copied into the slots of all its samples; a row that has finished leaves and the
next one takes its slot.

A draw depends on (seed, prompt, sample index, position) and on nothing else: its random number is a hash of
them. So the order, the number of processes and an interruption change nothing, and the batch size changes
results through rounding alone. tests/test_sampler.py has the same thing written slowly and obviously, and
holds `generate` to it token for token.

Left out on purpose: top-k, repetition penalties, beams.
"""
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

import manifest
import models
import packing
import run
from attention import Slots
from data import Problem, check_context, load_tokenizer, prompt_id, read_prompts, seed_of
from packing import alone, collate
from parallel import memory, replicate, say
from run import option

TRIES = 8     # rejected draws before the nucleus is cut by sorting; with top-p 0.95 one in 10^10 gets there
PREFILL = 8   # prompts prefilled together


# ---------------------------------------------------------------- drawing one token
def uniform(keys, counter):
    """int64 keys and counters of one shape -> float32 in (0, 1], by the splitmix64 hash
    (doi.org/10.1145/2714064.2660195). Products wrap around; torch has no unsigned ones."""
    def xored(x, bits):  # with its own higher bits
        return x ^ shifted(x, bits)

    def shifted(x, bits):  # filled up with zeros
        return (x >> bits) & (2**(64 - bits) - 1)

    x = keys + counter * (0x9E3779B97F4A7C15 - 2**64)
    x = xored(x, 30) * (0xBF58476D1CE4E5B9 - 2**64)
    x = xored(x, 27) * (0x94D049BB133111EB - 2**64)
    return (shifted(xored(x, 31), 40) + 1).float() * 2.0**-24


def draw(logits, keys, drawn, temperature, top_p):
    """(R, V) logits -> (R,) tokens, and the same as a list; exactly from the softmax at `temperature` cut to
    its top-p nucleus. keys, drawn (R,) int64: of each response, and how many tokens it has.

    A draw from the whole softmax that lies inside the nucleus is a draw from the nucleus; others are thrown
    again. That needs no sorting of the vocabulary. A token is inside if the mass of all likelier ones is
    below top_p. The list is what the host waits for, and mostly waits once: two throws are made together.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, tokens.tolist()
    probs, first = (logits.float() / temperature).softmax(-1), drawn * (TRIES + 1)
    tokens = throw(probs, keys, first, 2, top_p)
    listed = tokens.tolist()
    for attempt in range(2, TRIES + 1):
        if -1 not in listed:
            break
        again = torch.tensor([row for row, token in enumerate(listed) if token < 0], device=tokens.device)
        p = probs[again] if attempt < TRIES else nucleus(probs[again], top_p)
        tokens[again] = throw(p, keys[again], first[again] + attempt, 1, top_p if attempt < TRIES else 1)
        listed = tokens.tolist()
    return tokens, listed


def throw(probs, keys, counter, times, top_p):
    """(R, V) probabilities -> (R,) tokens: of so many throws the first inside the nucleus, or −1."""
    u = uniform(keys[:, None], counter[:, None] + torch.arange(times, device=keys.device))  # (R, times)
    cumulative = probs.cumsum(-1)
    tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:])
    if top_p == 1:
        return tokens[:, 0]
    inside = torch.stack([mass_above(probs, token) < top_p for token in tokens.split(1, 1)], 1)
    token = tokens.gather(1, inside.int().argmax(1, keepdim=True))[:, 0]  # argmax: the first of equals
    return torch.where(inside.any(1), token, -1)


def mass_above(probs, token):
    """(R, V), (R, 1) -> (R,): probability of everything likelier than `token`;
    among equals the lower id comes first."""
    mine = probs.gather(1, token)
    ids = torch.arange(probs.shape[1], device=probs.device)
    return (probs * ((probs > mine) | (probs == mine) & (ids < token))).sum(-1)


def nucleus(probs, top_p):
    """(R, V) -> (R, V): the smallest set of likeliest tokens whose mass reaches top_p, renormalised
    (arXiv 1904.09751)."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(1, order, kept / kept.sum(-1, keepdim=True))


# ---------------------------------------------------------------- the cache
def cache_tokens(model):
    """How many tokens the cache may hold: half of the memory that the weights leave. For Llama-3-8B on 80 GB
    that is 35 GB, 64 rows of 4,000 tokens. By what a device has, not by what is free: rows round."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize
    return max(0, memory() - weights) // 2 // token


def prefill(model, prompts):
    """Token lists -> per prompt (keys and values per layer, logits of its first response token)."""
    packed, kept = collate([alone(prompt) for prompt in prompts], model.device), []
    logits = model(**packed["inputs"], kept=kept, logits_to_keep=packed["last"], use_cache=False).logits[0]
    lengths = [len(prompt) for prompt in prompts]
    layers = [zip(keys.split(lengths, 1), values.split(lengths, 1)) for keys, values in kept]
    return list(zip(zip(*layers), logits))


@torch.no_grad()
def verify(model):
    """At a model's first use: hold a prefill and two steps to plain forward passes."""
    if hasattr(model, "cache_holds"):
        return
    packing.verify(model)
    chats = [row.trunk + branch for row in packing.probe_rows(model) for branch in row.branches][:3]
    with packing.trial(model, "the sampler's cache"):
        starts, logits = zip(*prefill(model, [chat[:-2] for chat in chats]))
        slots, ours = Slots(len(chats), max(map(len, chats)), model.device), [torch.stack(logits)]
        slots.fill(range(len(chats)), starts)
        for last in (-2, -1):
            slots.token[:] = torch.tensor([chat[last] for chat in chats])
            ours.append(slots.step(model, slots.capacity + last + 1))
        theirs = torch.stack([packing.plain(model, chat)[1][-3:] for chat in chats], 1)
        packing.compare(torch.stack(ours), theirs)
    model.cache_holds = True


# ---------------------------------------------------------------- many responses
def beginnings(model, prompts, samples):
    """((prompt, sample), the prompt's keys and values, logits of the first token) of all responses, prompts
    of like length next to each other and prefilled together."""
    order = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
    for at in range(0, len(order), PREFILL):
        some = order[at:at + PREFILL]
        for p, (prompt, logits) in zip(some, prefill(model, [prompts[p] for p in some])):
            for m in range(samples):
                yield (p, m), prompt, logits


@torch.inference_mode()
def generate(model, prompts, keys, *, stop_ids, temperature, top_p, max_new_tokens, rows):
    """Token lists (P) and (P, M) uint64 keys -> responses[p][m], token lists that include the stop token.

    `rows` responses are decoded at a time. One ends at a stop token, at max_new_tokens or where the context
    ends.
    """
    verify(model)
    limits = [min(max_new_tokens, model.context - len(prompt)) for prompt in prompts]
    capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    responses = [[[] for _ in samples] for samples in keys]
    waiting = beginnings(model, prompts, keys.shape[1])
    slots = Slots(min(rows, keys.size, max(1, cache_tokens(model) // capacity)), capacity, model.device)
    jobs = [None] * slots.rows  # row -> (prompt, sample); None: the row is free

    while True:
        free = [row for row, job in enumerate(jobs) if job is None]
        entering = list(islice(waiting, len(free)))
        if entering:  # schedule: responses that wait take the free rows
            new_jobs, starts, logits = zip(*entering)
            active, logits = free[:len(entering)], torch.stack(logits)
            slots.fill(active, starts, np.array([keys[job] for job in new_jobs], np.uint64).view(np.int64))
            for row, job in zip(active, new_jobs):
                jobs[row] = job
            rows = torch.tensor(active, device=model.device)
        elif len(free) == len(jobs):
            return responses
        else:  # step: a token for each row, in one forward pass; what free rows do is of no interest
            if len(free) >= 0.25 * len(jobs):  # nobody waits any more: close the gaps
                slots.keep([row for row, job in enumerate(jobs) if job])
                jobs = [job for job in jobs if job]
            active, rows = range(len(jobs)), slice(None)
            width = max(len(prompts[p]) + len(responses[p][m]) for p, m in filter(None, jobs))
            logits = slots.step(model, width)
        tokens, listed = draw(logits, slots.key[rows], slots.drawn[rows], temperature, top_p)
        slots.token[rows] = tokens
        slots.drawn[rows] += 1
        for row, token in zip(active, listed):  # retire: what has ended frees its row
            if jobs[row]:
                p, m = jobs[row]
                responses[p][m].append(token)
                if token in stop_ids or len(responses[p][m]) == limits[p]:
                    jobs[row] = None


# ---------------------------------------------------------------- the phase
def stop_tokens(folder, tokenizer):
    """All EOS ids of the generation config, and the tokenizer's."""
    try:
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        ids = None
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})


def block_size(prompts, filling):
    """Prompts in a block; `filling`: how many fill the rows. At most 28 fillings, and a multiple of 8 blocks,
    so that 2, 4 or 8 processes end together; but at least 4 fillings.

    At a block's end rows idle until its longest response is done: 6% of 28 fillings, 30% of 4. Rows don't go
    on into the next block: their company, and with it their rounding, would then depend on the number of
    processes and on interruptions. A block is what a kill costs.
    """
    blocks = 8 * -int(-prompts // (8 * 28 * filling))
    return max(1, int(4 * filling), -(-prompts // blocks))


def sample(folder, prompts, path, *, samples, temperature, top_p, max_new_tokens, seed, rows):
    """One JSON line per response in the file `path`: prompt, index, response, tokens, finished, policy.

    prompts: a list (text or messages). seed: a number or text; every phase of a run has its own.
    rows: responses decoded at a time.
    """
    tokenizer, encoded = load_tokenizer(folder), models.encode_prompts(folder, prompts)
    stop_ids = stop_tokens(folder, tokenizer)
    model = replicate(models.load_policy(folder))
    check_context([alone(ids) for ids in encoded], model, folder)
    longest = min(model.context, max(map(len, encoded)) + max_new_tokens)
    fit = cache_tokens(model) // longest
    if not fit:
        raise Problem(f"{folder}: no room for a response of {longest} tokens beside the model; set a smaller "
                      "--max_new_tokens or leave long prompts out")
    if fit < min(rows, samples * len(prompts)):
        say(f"memory has room for {fit} responses of {longest} tokens, the longest, at a time, not {rows}")

    def work(block):
        prompts, encoded = zip(*block)
        keys = np.array([[seed_of(seed, prompt_id(p), m) for m in range(samples)] for p in prompts],
                        np.uint64)
        responses = generate(model, encoded, keys, stop_ids=stop_ids, temperature=temperature, top_p=top_p,
                             max_new_tokens=max_new_tokens, rows=rows)
        for prompt, tokens in zip(prompts, responses):
            for index, ids in enumerate(tokens):
                yield dict(prompt=prompt, index=index,
                           response=tokenizer.decode(ids, skip_special_tokens=True),
                           tokens=len(ids), finished=ids[-1] in stop_ids, policy=str(folder))

    run.in_blocks(list(zip(prompts, encoded)), block_size(len(prompts), rows / samples), path, work,
                  f"sampling {Path(path).name.split('.')[0]}", each=samples)


@dataclass
class Options:
    model: str = option(help="policy: a folder or hub id")
    prompts: str = option(help="JSONL, JSON, parquet or hub id with a field `prompt`")
    out: str = option(help="samples.jsonl")
    prompt_field: str = option("", "where in a row the prompt stands, if not under a usual name")
    skip_long: bool = option(False, "leave out prompts that are too long for the model")
    samples: int = option(5, "responses per prompt (M)")
    temperature: float = option(0.8, "0: greedy")
    top_p: float = option(0.95)
    max_new_tokens: int = option(1024)
    seed: int = option(0)
    sample_batch: int = option(64, "responses decoded at a time in each process")


def main():
    o = run.parse(Options)
    folder = models.local_folder(o.model)
    prompts, repeats = read_prompts(o.prompts, o.prompt_field)
    manifest.claim(o.out, o, file=True)
    if not run.exists(o.out):
        encoded = models.encode_prompts(folder, prompts, o=o)
        prompts = [prompt for prompt, ids in zip(prompts, encoded) if ids is not None]
        say(f"{len(prompts)} prompts ({repeats} repeated ones left out), {o.samples} responses each")
        sample(folder, prompts, o.out, samples=o.samples, temperature=o.temperature, top_p=o.top_p,
               seed=o.seed, max_new_tokens=o.max_new_tokens, rows=o.sample_batch)
    say(f"{o.out} is complete")


if __name__ == "__main__":
    run.launch(main)

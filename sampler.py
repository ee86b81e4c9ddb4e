"""Sample responses: prompts -> samples.jsonl.

    python sampler.py --model MODEL --prompts prompts.jsonl --out samples.jsonl --samples 5

Many responses are decoded together, each in a row of the key-value cache. A prompt is prefilled once, and its
keys and values are copied into the rows of all its samples. When a response ends, the next one that waits
takes its row. To follow one token: `generate` draws it with `draw`. `Slots.step` runs the model on it. In
each layer `Slots.attend` adds its key and value to the cache and attends to what its row has there.

The random number of a draw is a hash of (seed, prompt, index of the sample, position, attempt) alone. So the
order of prompts, the number of processes and an interruption change nothing, and the batch size changes
results through rounding alone. tests/test_sampler.py has the same sampler in its slow and obvious form, which
`generate` must equal token for token.

Left out on purpose: top-k, repetition penalties, beams.
"""
import time
from array import array
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from common import data, models, probe, run
from common.data import encode_chat, load_tokenizer, prompt_id, sample_fields, seed_of, stop_tokens
from common.packing import check_context, collate, row_of
from common.parallel import Problem, memory, replicate, say, share_work
from common.run import option

TRIES = 8     # draws before the nucleus is found by sorting, which at top-p 0.95 one token in 10^10 needs
PREFILL = 8   # prompts prefilled together

# ---------------------------------------------------------------- drawing one token
def uniform(seeds, counter):
    """int64 seeds, counters -> uniform float32 in (0, 1], by splitmix64 (doi.org/10.1145/2714064.2660195)."""
    def shifted(x, bits):  # fills with zeros, while >> of torch's signed int64 copies the sign
        return (x >> bits) & (2**(64 - bits) - 1)

    x = seeds + counter * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return (shifted(x ^ shifted(x, 31), 40) + 1).float() * 2.0**-24

def nucleus(probs, top_p):
    """(R, V) -> (R, V): the smallest set of likeliest tokens whose mass reaches top_p, renormalised
    (arXiv 1904.09751). This is the definition of what `draw` draws from."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(1, order, kept / kept.sum(-1, keepdim=True))

def draw(logits, seeds, drawn, temperature, top_p):
    """(R, V) logits -> (R,) tokens, drawn from the nucleus of the softmax at `temperature`, and the same as a
    list. seeds, drawn (R,) int64: the seed of each response, and how many tokens it has so far.

    `draw` has the distribution of `nucleus` without its sorting, which makes it 3.4 times as fast at a
    vocabulary of 128k: draw from the whole softmax, and again until the token lies in the nucleus, as it does
    if all likelier tokens have less than top_p together. Two are drawn at once, as the CPU waits for each."""
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, tokens.tolist()
    probs, first = (logits.float() / temperature).softmax(-1), drawn * (TRIES + 1)
    tokens = throw(probs, seeds, first, 2, top_p)
    listed = tokens.tolist()
    for attempt in range(2, TRIES + 1):
        if -1 not in listed:
            break
        again = torch.tensor([row for row, token in enumerate(listed) if token < 0], device=tokens.device)
        p, cut = (probs[again], top_p) if attempt < TRIES else (nucleus(probs[again], top_p), 1)
        tokens[again] = throw(p, seeds[again], first[again] + attempt, 1, cut)
        listed = tokens.tolist()
    return tokens, listed

def throw(probs, seeds, counter, times, top_p):
    """(R, V) probabilities -> (R,) tokens: the first of `times` draws that lies in the nucleus, or −1."""
    u = uniform(seeds[:, None], counter[:, None] + torch.arange(times, device=seeds.device))  # (R, times)
    cumulative = probs.cumsum(-1)
    tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:])
    if top_p == 1:
        return tokens[:, 0]
    inside = torch.stack([mass_above(probs, token) < top_p for token in tokens.split(1, 1)], 1)
    token = tokens.gather(1, inside.int().argmax(1, keepdim=True))[:, 0]  # argmax gives the first of equals
    return torch.where(inside.any(1), token, -1)

def mass_above(probs, token):
    """(R, V), (R, 1) -> (R,): the probability of all tokens that are likelier than `token`. Of equally likely
    tokens the one with the lower id counts as likelier, as in a stable sort."""
    mine, ids = probs.gather(1, token), torch.arange(probs.shape[1], device=probs.device)
    return (probs * ((probs > mine) | (probs == mine) & (ids < token))).sum(-1)

# ---------------------------------------------------------------- the key-value cache
class Slots:
    """The key-value cache of R responses that are decoded together, a row each.

    layers: for each call of attention the keys (R, kv_heads, D, capacity) and values (R, kv_heads, capacity,
    D). In these layouts the two products of attention are fastest. The tokens of row r are at 0 … at[r] − 1,
    so there is no padding and a token's index is its position. token[r] is the last one, drawn but not yet in
    the cache. seed[r] and drawn[r] go to `draw`. rows: 0 … R − 1. All these stay on the model's device."""
    def __init__(self, rows, capacity, device):
        self.rows, self.capacity, self.layers = torch.arange(rows, device=device), capacity, []
        self.token, self.at, self.seed, self.drawn = torch.zeros(4, rows, dtype=torch.long, device=device)

    def fill(self, rows, starts, seeds=0):
        """Copy a prefilled prompt into each row. starts: for each row the (keys, values) of all layers, both
        (kv_heads, length, D)."""
        for k, v in starts[0] if not self.layers else ():
            self.layers.append((k.new_zeros(len(self.rows), len(k), k.shape[2], self.capacity),
                                v.new_zeros(len(self.rows), len(v), self.capacity, v.shape[2])))
        for row, start in zip(rows, starts):
            for (keys, values), (k, v) in zip(self.layers, start):
                keys[row, :, :, :k.shape[1]] = k.transpose(1, 2)
                values[row, :, :v.shape[1]] = v
            self.at[row] = k.shape[1]
        rows = torch.as_tensor(rows, device=self.at.device)
        self.seed[rows], self.drawn[rows] = torch.as_tensor(seeds, device=self.at.device), 0

    def keep(self, rows):
        """Shrink the cache to these rows."""
        rows = torch.as_tensor(rows, device=self.at.device)
        for layer, (keys, values) in enumerate(self.layers):  # by layers: two whole caches may not fit
            self.layers[layer] = keys[rows], values[rows]
        self.rows = self.rows[:len(rows)]
        self.token, self.at, self.seed, self.drawn = (
            of_rows[rows] for of_rows in (self.token, self.at, self.seed, self.drawn))

    def step(self, model, width):
        """Run the model on the last token of each row. Returns the logits (R, V) of the next ones. width: how
        many tokens the longest row has, this one included."""
        age = self.at[:, None] - torch.arange(width, device=self.at.device)  # (R, width); negative: not there

        @cache
        def bias(window):
            """(R, 1, 1, width): 0 where the last token of a row may attend to a token, else −∞."""
            unseen = age < 0 if window is None else (age < 0) | (age >= window)
            return torch.zeros_like(age, dtype=torch.float32).masked_fill_(unseen, -torch.inf)[:, None, None]

        attend = partial(self.attend, width, bias, iter(self.layers))
        logits = model(input_ids=self.token[:, None], position_ids=self.at[:, None], attend=attend,
                       use_cache=False).logits[:, -1]
        self.at = (self.at + 1).clamp(max=self.capacity - 1)  # free rows count on, too
        return logits

    def attend(self, width, bias, layers, query, key, value, scaling, window):
        """Add this step's keys and values to the cache and attend: (R, heads, 1, D) -> (R, 1, heads, D).
        packing.attention calls it once in each layer, or twice in models that attend twice a layer."""
        keys, values = next(layers)
        keys[self.rows, :, :, self.at], values[self.rows, :, self.at] = key[:, :, 0], value[:, :, 0]
        grouped = query.reshape(len(query), keys.shape[1], -1, query.shape[-1])  # by shared keys
        scaling = scaling or query.shape[-1]**-0.5
        scores = fp32_product(grouped, keys[..., :width]) * scaling + bias(window)
        result = scores.softmax(-1).to(values.dtype) @ values[:, :, :width]
        return result.view(len(query), 1, -1, values.shape[-1])

def fp32_product(a, b):
    """(R, H, M, D) @ (R, H, D, N), accumulated and returned in fp32 even if the factors are bf16."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])

@torch.no_grad()
def cache_tokens(model):
    """How many tokens fit into half of the memory that the weights leave, whatever is free now, since
    the number of rows changes rounding. For Llama-3-8B on 80 GB that is 35 GB, 64 rows of 4,000 tokens."""
    verify(model)
    [(layers, _)] = prefill(model, [[0]])  # the keys and values of one token
    token = sum(keys.nbytes + values.nbytes for keys, values in layers)
    weights = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize
    return max(0, memory() - weights) // 2 // token

def prefill(model, prompts):
    """P token lists -> P times ((keys, values) of each layer, logits (V,) of the first response token)."""
    packed, kept = collate([row_of(prompt, [[]]) for prompt in prompts], model.device), []
    logits = model(**packed["inputs"], kept=kept, logits_to_keep=packed["last"], use_cache=False).logits[0]
    lengths = [len(prompt) for prompt in prompts]
    layers = [zip(keys.split(lengths, 1), values.split(lengths, 1)) for keys, values in kept]
    return list(zip(zip(*layers), logits))

@torch.no_grad()
def verify(model):
    """At a model's first use, compare a prefill and two decoding steps with plain forward passes."""
    if hasattr(model, "cache_works"):
        return
    probe.verify(model)
    chats = [row.trunk + branch for row in probe.probe_rows(model) for branch in row.branches][:3]
    with probe.trial(model, "the sampler's cache"):
        starts, logits = zip(*prefill(model, [chat[:-2] for chat in chats]))
        slots, ours = Slots(len(chats), max(map(len, chats)), model.device), [torch.stack(logits)]
        slots.fill(range(len(chats)), starts)
        for last in (-2, -1):
            slots.token[:] = torch.tensor([chat[last] for chat in chats])
            ours.append(slots.step(model, slots.capacity + last + 1))
        theirs = torch.stack([probe.plain_pass(model, chat)[1][-3:] for chat in chats], 1)
        probe.compare(torch.stack(ours), theirs)
    model.cache_works = True

# ---------------------------------------------------------------- many responses
def beginnings(model, prompts, samples):
    """Yield ((prompt, sample), the prompt's keys and values, logits of the first token) for each response
    that is to be drawn. PREFILL prompts of like length are prefilled together."""
    order = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
    for at in range(0, len(order), PREFILL):
        some = order[at:at + PREFILL]
        for p, (start, logits) in zip(some, prefill(model, [prompts[p] for p in some])):
            for m in range(samples):
                yield (p, m), start, logits

def enter(slots, jobs, free, entering, seeds):
    """Put the beginnings `entering` into free rows. Returns these rows and their logits (rows, V)."""
    new_jobs, starts, logits = zip(*entering)
    rows = free[:len(entering)]
    slots.fill(rows, starts, np.array([seeds[job] for job in new_jobs], np.uint64).view(np.int64))
    for row, job in zip(rows, new_jobs):
        jobs[row] = job
    return torch.tensor(rows, device=slots.rows.device), torch.stack(logits)

@torch.inference_mode()
def generate(model, prompts, seeds, *, stop_ids, temperature, top_p, max_new_tokens, rows):
    """P prompts as token lists, and seeds (P, M) uint64 -> responses[p][m], token lists. A response ends
    with a stop token, which it includes, or without one at max_new_tokens or at the end of the context.

    rows: how many responses are decoded together at most. If rows are free and responses wait, a turn of the
    loop fills these rows and draws their first tokens. Otherwise it draws a token for every row."""
    verify(model)
    limits = [min(max_new_tokens, model.context - len(prompt)) for prompt in prompts]
    capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    responses = [[[] for _ in samples] for samples in seeds]
    waiting = beginnings(model, prompts, seeds.shape[1])
    slots = Slots(min(rows, seeds.size, max(1, cache_tokens(model) // capacity)), capacity, model.device)
    jobs = [None] * len(slots.rows)  # jobs[row] = (p, m): the response in this row; None: the row is free
    told = time.time()

    while True:
        if time.time() > told + 30:
            told = time.time()
            say(f"  {sum(map(len, chain(*responses)))} tokens so far, of {seeds.size} responses")
        free = [row for row, job in enumerate(jobs) if job is None]
        entering = list(islice(waiting, len(free)))
        if entering:  # some responses wait, and some rows are free
            active, logits = enter(slots, jobs, free, entering, seeds)
        elif len(free) == len(jobs):
            return responses
        else:  # a decoding step for all rows; the tokens of free rows are ignored
            if len(free) >= 0.25 * len(jobs):  # none waits any more, so free rows would stay free
                slots.keep([row for row, job in enumerate(jobs) if job])
                jobs = [job for job in jobs if job]
            active = slots.rows
            width = max(len(prompts[p]) + len(responses[p][m]) for p, m in filter(None, jobs))
            logits = slots.step(model, width)
        tokens, listed = draw(logits, slots.seed[active], slots.drawn[active], temperature, top_p)
        slots.token[active] = tokens
        slots.drawn[active] += 1
        for row, token in zip(free if entering else range(len(jobs)), listed):  # `free` may be longer
            if jobs[row]:
                p, m = jobs[row]
                responses[p][m].append(token)
                if token in stop_ids or len(responses[p][m]) == limits[p]:
                    jobs[row] = None

def block_size(prompts, filling):
    """How many prompts one block has. A block is what a process takes at a time, and what a kill can lose.

    filling: how many prompts fill all rows. Rows idle until the longest response of a block is done: 30% of
    the time if the block fills all rows 4 times, 6% if 28 times. So a block has 4 to 28 fillings, but at most
    half of the prompts. Of many blocks the number is a multiple of 8, so that 8 processes end together."""
    blocks = 8 * -int(-prompts // (8 * 28 * filling))
    return max(1, min(int(4 * filling), -(-prompts // 2)), -(-prompts // blocks))

def sample(folder, prompts, path, *, samples, temperature, top_p, max_new_tokens, seed, rows):
    """Write a row for each response to the file `path`: prompt, index, policy, and data.sample_fields.

    seed: a number or text, another one for each phase of a run. rows: responses decoded together."""
    tokenizer = load_tokenizer(folder)
    encoded = share_work(len(prompts), lambda i: array("i", encode_chat(tokenizer, prompts[i])), "tokens")
    stop_ids = stop_tokens(folder, tokenizer)
    model = replicate(models.load_policy(folder))
    check_context([row_of(ids, [ids[:1]]) for ids in encoded], model, folder, "take another model")
    longest = min(model.context, max(map(len, encoded)) + max_new_tokens)
    if longest > cache_tokens(model):
        raise Problem(f"{folder}: a prompt and response of {longest} tokens don't fit into memory beside the "
                      "model; set a smaller --max_new_tokens or leave out long prompts")

    def work(block):
        prompts, encoded = zip(*block)
        seeds = [[seed_of(seed, prompt_id(prompt), m) for m in range(samples)] for prompt in prompts]
        responses = generate(model, encoded, np.array(seeds, np.uint64), stop_ids=stop_ids, rows=rows,
                             temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
        for prompt, tokens in zip(prompts, responses):
            for index, ids in enumerate(tokens):
                yield dict(prompt=prompt, index=index, policy=str(folder),
                           **sample_fields(tokenizer, ids, ids[-1] in stop_ids))

    run.in_blocks(list(zip(prompts, encoded)), block_size(len(prompts), rows / samples), path, work,
                  f"sampling {Path(path).name.split('.')[0]}")

@dataclass
class Options:
    model: str = option(help="policy: a folder or hub id")
    prompts: str = option(help="JSONL, JSON, parquet or hub id with a field `prompt`")
    out: str = option(help="samples.jsonl")
    samples: int = option(5, "responses per prompt (M)")
    temperature: float = option(0.8, "0: greedy")
    top_p: float = option(0.95)
    max_new_tokens: int = option(1024)
    seed: int = option(0)
    sample_batch: int = option(64, "responses decoded together in each process")
    overwrite: bool = option(False, "delete the result that --out holds and start again")

def main():
    o = run.parse(Options)
    folder = models.local_folder(o.model)
    prompts, repeats = data.read_prompts(o.prompts)
    run.claim(o.out, o, file=True)
    if not run.exists(o.out):
        prompts, _ = models.prompts_that_fit(folder, prompts)
        say(f"{len(prompts)} prompts ({repeats} repeated ones left out), {o.samples} responses each")
        sample(folder, prompts, o.out, samples=o.samples, temperature=o.temperature, top_p=o.top_p,
               seed=o.seed, max_new_tokens=o.max_new_tokens, rows=o.sample_batch)
    say(f"{o.out} is complete")

if __name__ == "__main__":
    run.launch(main)

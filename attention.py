"""How models attend here: within each chat of a packed sequence or, when sampling, to a cache.

Models know `attention` by the name "packed", which models.py gives them, and call it in every layer. What it
computes is held to transformers' own attention (packing.verify, sampler.verify).

Left out on purpose: kernels of our own; sinks and caps.
"""
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import Problem

HARMLESS = ("dropout", "is_causal", "position_ids", "output_attentions", "output_router_logits", "use_cache")


def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, chats=None,
              places=None, slots=None, kept=None, **options):
    """Causal attention within each chat of a packed sequence. The sampler's steps come with `slots`
    instead, and calls with neither get transformers' own attention.

    query (1, heads, T, D); key, value (1, kv_heads, T, D).
    chats: per group (C, L), the indices into T of the tokens of C chats. places (T,): where each token finds
    its result among those of all groups (a trunk's are the same in all its chats).
    sliding_window: how many tokens each one sees, itself included. kept: a list, for the keys and values.
    Returns (1, T, heads, D).
    """
    if chats is None and slots is None:
        if attention_mask is not None and not attention_mask.numel():  # it is collate's: chats were given
            raise Problem("attention is told nothing of who shares a sequence")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    for name, option in options.items():
        if name not in HARMLESS and option is not None:
            raise Problem(f"attention has {name}")
    if slots is not None:
        return slots.attend(query, key, value, scaling, sliding_window), None
    if attention_mask is not None and attention_mask.numel():
        raise Problem("attention has a mask of its own")
    if kept is not None:
        kept.append((key[0], value[0]))
    results = []
    for chat in chats:
        q, k, v = (x[0].transpose(0, 1)[chat].transpose(1, 2) for x in (query, key, value))  # (C, …, L, D)
        if sliding_window and sliding_window < q.shape[2]:  # a dense mask: no faster than without a window
            k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))  # what masks want of fast kernels
            age = torch.arange(q.shape[2], device=q.device)
            age = age[:, None] - age
            result = F.scaled_dot_product_attention(
                q, k, v, attn_mask=(age >= 0) & (age < sliding_window), scale=scaling)
        else:
            result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        results.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(results)[places][None], None


AttentionInterface.register("packed", attention)
AttentionMaskInterface.register("packed", sdpa_mask)  # for calls without chats


# ---------------------------------------------------------------- the cache
class Slots:
    """Keys (R, kv_heads, D, capacity) and values (R, kv_heads, capacity, D) of R rows in flight, per layer;
    these are the layouts in which the two products of attention run fastest.

    Row r's tokens lie at 0 … at[r], whatever the others' lengths: no padding, positions are indices. The last
    one, token[r], is drawn, but not yet in the cache. key[r] and drawn[r] are the sampler's: the response's
    key and how many tokens it has. All that changes with every token stays on the device.
    """
    def __init__(self, rows, capacity, device):
        self.rows, self.capacity, self.layers = rows, capacity, []  # a layer: the n-th attention in a pass
        self.token, self.at, self.key, self.drawn = torch.zeros(4, rows, dtype=torch.long, device=device)

    def fill(self, rows, prompts, key=0):
        """Copy prefilled prompts, per layer keys and values (kv_heads, length, D), one into each row."""
        if not self.layers:
            for k, v in prompts[0]:
                self.layers.append((k.new_zeros(self.rows, len(k), k.shape[2], self.capacity),
                                    v.new_zeros(self.rows, len(v), self.capacity, v.shape[2])))
        for _, group in groupby(zip(rows, prompts), key=lambda pair: id(pair[1])):  # samples of one prompt
            some, (prompt, *_) = zip(*group)
            some, length = torch.tensor(some, device=self.at.device), prompt[0][0].shape[1]
            for (keys, values), (k, v) in zip(self.layers, prompt):
                keys[some, :, :, :length] = k.transpose(1, 2)
                values[some, :, :length] = v
            self.at[some] = length
        rows = torch.as_tensor(rows, device=self.at.device)
        self.key[rows], self.drawn[rows] = torch.as_tensor(key, device=self.at.device), 0

    def keep(self, rows):
        """Close the gaps: from now on there are only these rows."""
        rows = torch.as_tensor(rows, device=self.at.device)
        for i, (keys, values) in enumerate(self.layers):  # a layer at a time: two caches never exist at once
            self.layers[i] = keys[rows], values[rows]
        self.rows = len(rows)
        self.token, self.at, self.key, self.drawn = (
            of_rows[rows] for of_rows in (self.token, self.at, self.key, self.drawn))

    def step(self, model, width):
        """(R, V) logits of the next token of each row, of which the longest has `width` tokens."""
        self.width, self.layer = width, 0
        self.age = self.at[:, None] - torch.arange(self.width, device=self.at.device)  # (R, width)
        bias = torch.zeros(self.age.shape, device=self.at.device).masked_fill_(self.age < 0, -torch.inf)
        self.bias = {None: bias[:, None, None]}  # per attention window
        logits = model(input_ids=self.token[:, None], position_ids=self.at[:, None], slots=self,
                       attention_mask=self.bias[None], use_cache=False).logits[:, -1]
        self.at = (self.at + 1).clamp(max=self.capacity - 1)  # where rows are free it means nothing
        return logits

    def attend(self, query, key, value, scaling, window):
        """Attention of this step's tokens (R, heads, 1, D) to their rows so far -> (R, 1, heads, D).
        The model calls it in every layer, by way of `attention`."""
        keys, values = self.layers[self.layer]
        self.layer += 1
        if window not in self.bias:
            self.bias[window] = self.bias[None].masked_fill((self.age >= window)[:, None, None], -torch.inf)
        every = torch.arange(self.rows, device=query.device)
        keys[every, :, :, self.at], values[every, :, self.at] = key[:, :, 0], value[:, :, 0]
        grouped = query.reshape(self.rows, keys.shape[1], -1, query.shape[-1])  # heads that share keys
        scaling = scaling or query.shape[-1]**-0.5
        scores = _fp32_product(grouped, keys[..., :self.width]) * scaling + self.bias[window]
        result = scores.softmax(-1).to(values.dtype) @ values[:, :, :self.width]
        return result.view(self.rows, 1, -1, values.shape[-1])


def _fp32_product(a, b):
    """(R, H, M, D) @ (R, H, D, N) in fp32, also where the factors are bf16 (on GPUs only)."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])

"""Many answers in one forward pass: every prompt once, and no padding tokens between them.

A Row is a prompt (the trunk) with its answers (the branches): the two of a pair, or five samples. `collate`
lays the tokens of many rows end to end as one sequence. Everything in a transformer but attention treats
tokens one by one, so attention alone must know where a chat begins and ends: it takes the chats apart again,
attends in each as usual and puts the results back. common/probe.py refuses models in which tokens meet in
other ways.

Left out on purpose: attention kernels of our own, sinks and caps.
"""
from array import array
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from common.data import encode_chat
from common.parallel import Problem, share_work

LOGITS = 2**23  # logits in memory at a time (32 MB in fp32)
TOGETHER = 8  # chats of like lengths that attend in one call, padded to the longest of them

# ---------------------------------------------------------------- rows
class Row(NamedTuple):
    trunk: array    # tokens shared by all answers: the prompt
    branches: list  # per answer, its tokens after the trunk
    starts: list    # per answer, the index in its branch where the response begins

    def __len__(self):
        return len(self.trunk) + sum(map(len, self.branches))

def pack(chats):
    """Answers to one prompt as a Row: their common beginning once, never further than the first response."""
    chats = [chat._replace(ids=array("i", chat.ids)) for chat in chats]  # a tenth of a list's memory
    trunk = chats[0].ids[:min(chat.start for chat in chats)]
    for chat in chats[1:]:
        trunk = trunk[:next((i for i, (a, b) in enumerate(zip(trunk, chat.ids)) if a != b), len(trunk))]
    cut = len(trunk)
    return Row(trunk, [chat.ids[cut:] for chat in chats], [chat.start - cut for chat in chats])

def alone(ids):
    """A chat without siblings, as a Row."""
    return Row(ids, [ids[:0]], [0])

def pair_rows(tokenizer, pairs, max_length, unfinished=False):
    """Preference pairs -> (rows of two branches, chosen first; the pairs of these rows). Pairs of which
    either side is longer than `max_length` tokens are left out; if all are, that is a Problem.
    unfinished: a response that was cut off carries no stop token (policies learn from it); else every answer
    ends properly, with the whole of the template, as reward models expect."""
    def encode(number):
        pair = pairs[number]
        chats = [encode_chat(tokenizer, pair["prompt"], pair[side],
                             pair.get(f"{side}_finished", True) or not unfinished, whole=not unfinished)
                 for side in ("chosen", "rejected")]
        if max(len(chat.ids) for chat in chats) <= max_length \
                and all(chat.start < len(chat.ids) for chat in chats):
            return pack(chats)

    rows = share_work(len(pairs), encode, "tokens")
    if not any(rows):
        raise Problem(f"none of {len(pairs)} pairs is short enough for --max_length {max_length}")
    return [row for row in rows if row], [pair for pair, row in zip(pairs, rows) if row]

def how_many(kept, total):
    """How many of the pairs are short enough, in words, and in loud ones if a tenth is not."""
    return f"{kept} pairs ({total - kept} too long)" if total - kept <= total / 10 else (
        f"{kept} pairs; WARNING: {total - kept} OF {total} ARE TOO LONG AND LEFT OUT")

def check_context(rows, model, folder, mend="set a smaller --max_length"):
    """A chat that is longer than the model's context, or a token that it doesn't know, is a Problem."""
    longest = max(len(row.trunk) + len(branch) for row in rows for branch in row.branches)
    if longest > model.context:
        raise Problem(f"{folder}: a chat of {longest} tokens does not fit into its context of "
                      f"{model.context}; leave it out or {mend}")
    vocabulary = model.config.get_text_config().vocab_size
    if max(max(ids) for row in rows for ids in (row.trunk, *row.branches) if len(ids)) >= vocabulary:
        raise Problem(f"{folder}: the tokenizer has more tokens than the model's {vocabulary}")

def collate(rows, device="cpu"):
    """Rows to one sequence of T tokens, as a dict.

    inputs: for the model. input_ids, position_ids (1, T), where positions go on from the trunk in every
    branch; chats, places: see `attention`. targets, sources, owners (N,): the responses' tokens, the index
    into T of the token that predicts each, and the number of the answer that each belongs to. last
    (answers,): the index of each answer's last token.
    """
    ids, positions, chats, targets, sources, owners = [], [], [], [], [], []
    for trunk, branches, starts in rows:
        shared = range(len(ids), len(ids) + len(trunk))
        ids += trunk
        positions += range(len(trunk))
        for branch, start in zip(branches, starts):
            chat = [*shared, *range(len(ids), len(ids) + len(branch))]
            ids += branch
            positions += range(len(trunk), len(chat))
            targets += branch[start:]
            sources += chat[len(trunk) + start - 1:len(chat) - 1]
            owners += [len(chats)] * (len(branch) - start)
            chats.append(chat)

    def tensor(values):
        return torch.tensor(values, dtype=torch.long, device=device)

    groups, places = group_chats(chats, len(ids))
    inputs = dict(input_ids=tensor([ids]), position_ids=tensor([positions]),
                  chats=[torch.as_tensor(group, device=device) for group in groups],
                  places=torch.as_tensor(places, device=device))
    return dict(inputs=inputs, targets=tensor(targets), sources=tensor(sources), owners=tensor(owners),
                last=tensor([chat[-1] for chat in chats]))

# ---------------------------------------------------------------- attention
def group_chats(chats, tokens):
    """Chats, as lists of indices into a sequence of so many tokens -> (groups, places), for `attention`.

    groups: per group of chats of like length an array (C, L) of these indices. Shorter chats are padded by
    their last token. Attention is causal, so padding changes nothing before it.
    places (tokens,): where each token stands among those of all groups, laid end to end.
    """
    order = sorted(range(len(chats)), key=lambda c: len(chats[c]))
    groups, places, before = [], np.zeros(tokens, np.int64), 0
    for start in range(0, len(order), TOGETHER):
        group = [chats[c] for c in order[start:start + TOGETHER]]
        length = len(group[-1])
        for number, chat in enumerate(group):
            places[chat] = before + number * length + np.arange(len(chat))
        groups.append(np.array([chat + chat[-1:] * (length - len(chat)) for chat in group]))
        before += groups[-1].size
    return groups, places

HARMLESS = ("dropout", "is_causal", "position_ids", "output_attentions", "output_router_logits", "use_cache")

def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, chats=None,
              places=None, kept=None, attend=None, **options):
    """Causal attention within each chat of a packed sequence: what models call in every layer under the name
    "packed", which models.py gives them. (1, heads, T, D), twice (1, kv_heads, T, D) -> (1, T, heads, D).

    chats, places: of `group_chats`, as tensors. sliding_window: how many tokens each one sees, with itself.
    kept: a list that gets the keys and values of each call, for the sampler's prefill. attend: the sampler's
    attention to its cache, in the place of all this (sampler.py).
    """
    for name, option in options.items():
        if name not in HARMLESS and option is not None:
            raise Problem(f"attention has {name}")
    if attention_mask is not None:
        raise Problem("attention has a mask of its own")
    if attend is not None:
        return attend(query, key, value, scaling, sliding_window), None
    if chats is None:
        raise Problem("attention is told nothing of who shares a sequence")
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

def decoder(model):
    """A model without its head."""
    return (model.base_model if model.base_model is not model else model.model).get_decoder()

def hidden_states(model, packed):
    """(T, H): the last hidden states of a packed sequence (`collate`)."""
    return decoder(model)(**packed["inputs"], use_cache=False).last_hidden_state[0]

def response_logits(model, packed):
    """(N, V) logits for the tokens of the responses, by the model's own way from its hidden states."""
    return model(**packed["inputs"], use_cache=False, logits_to_keep=packed["sources"]).logits[0]

# ---------------------------------------------------------------- log-probabilities
class TokenLogps(torch.autograd.Function):
    """(N, H) hidden states, (V, H) head, (N,) targets -> (N,) log-probabilities in fp32, by definition

        (hidden @ head.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    Here it is done a tile of the vocabulary at a time, so the logits of all tokens never exist at once. The
    backward pass computes them again, unless they fitted into one tile.
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        size = max(1, LOGITS // len(hidden))
        total = torch.full(targets.shape, -torch.inf, device=hidden.device)  # log Σ exp(logits) so far
        chosen = torch.zeros_like(total)                                     # logits of the targets
        for at in range(0, len(weight), size):
            logits = (hidden @ weight[at:at + size].T).float()
            total = torch.logaddexp(total, logits.logsumexp(-1))
            column, inside = _column(targets, at, logits)
            chosen = torch.where(inside, logits.gather(1, column)[:, 0], chosen)
        ctx.save_for_backward(hidden, weight, targets, total, logits if size >= len(weight) else None)
        ctx.size = size
        return chosen - total

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, total, kept = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        for at in range(0, len(weight), ctx.size):
            tile = weight[at:at + ctx.size]
            logits = (hidden @ tile.T).float() if kept is None else kept
            column, inside = _column(targets, at, logits)
            # ∂ log p(target) / ∂ logits = 1[target] − softmax(logits)
            grad_logits = (logits - total[:, None]).exp_().mul_(-grad[:, None])
            grad_logits = grad_logits.scatter_add_(1, column, (grad * inside)[:, None]).to(hidden.dtype)
            torch.mm(grad_logits.T, hidden, out=grad_weight[at:at + ctx.size])
            grad_hidden += grad_logits @ tile
        return grad_hidden.to(hidden.dtype), grad_weight, None

def _column(targets, at, logits):
    """Columns (N, 1) of the targets in the tile that begins with token `at`; whether they are in it (N,)."""
    column = targets - at
    inside = (column >= 0) & (column < logits.shape[1])
    return (column * inside)[:, None], inside

"""Packing: many answers in one forward pass, with each prompt once and no padding between them.

A Row is a prompt, its trunk, with the answers to it, its branches: the two of a pair, or five samples.
`collate` lays the tokens of many rows end to end as one sequence. All parts of a transformer but attention
treat each token by itself. So `attention` takes the chats apart, attends within each as usual, and puts the
results back in place. common/probe.py refuses models that mix tokens in any other way.

Left out on purpose: attention kernels of our own, attention sinks and soft caps.
"""
import os
from array import array
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from common.data import SIDES, encode_chat, response_ids
from common.parallel import Problem, say, share_work

LOGITS = 2**23  # how many logits TokenLogps holds at a time: 32 MB in fp32
TOGETHER = 8    # how many chats of like length attend in one call, padded to the longest of them

# ---------------------------------------------------------------- rows
class Row(NamedTuple):
    trunk: array    # the tokens that all answers share: the prompt
    branches: list  # for each answer, its tokens after the trunk

    def __len__(self):  # the number of tokens, not of the tuple's fields
        return len(self.trunk) + sum(map(len, self.branches))

def row_of(prompt, answers):
    """The tokens of a prompt and of its answers -> a Row."""
    return Row(array("i", prompt), [array("i", answer) for answer in answers])  # a tenth of a list's memory

def whole_chats(tokenizer, prompt, answers):
    """A prompt and answers to it -> a Row of whole chats, as reward models read them. The trunk is as much of
    the prompt as all have in common: a template may write a chat with an answer otherwise."""
    chats = [encode_chat(tokenizer, prompt, answer) for answer in answers]
    cut = len(os.path.commonprefix([encode_chat(tokenizer, prompt), *chats]))
    return row_of(chats[0][:cut], [chat[cut:] for chat in chats])

def pair_rows(tokenizer, pairs, max_length, policy=False):
    """Preference pairs -> (rows, pairs): a Row with the branches (chosen, rejected) for each pair of which
    both sides have at most `max_length` tokens, and these pairs. Raises a Problem if there are none.

    policy: tokens as a policy samples them, prompt and response apart; else those of whole chats."""
    def encode(number):
        pair = pairs[number]
        if policy:
            return row_of(encode_chat(tokenizer, pair["prompt"]),
                          [response_ids(tokenizer, pair, side) for side in SIDES])
        return whole_chats(tokenizer, pair["prompt"], [pair[side] for side in SIDES])

    rows = share_work(len(pairs), encode, "tokens")
    others = sum(f"{side}_ids" in pair and pair[f"{side}_ids"] != [*branch] for pair, row in zip(pairs, rows)
                 for side, branch in zip(SIDES, row.branches)) if policy else 0
    if others:
        say(f"{others} of {2 * len(pairs)} answers have tokens of another tokenizer or text: the text counts")
    kept = [(row, pair) for row, pair in zip(rows, pairs)
            if all(row.branches) and len(row.trunk) + max(map(len, row.branches)) <= max_length]
    if not kept:
        raise Problem(f"none of {len(pairs)} pairs is short enough for --max_length {max_length}")
    return tuple(map(list, zip(*kept)))

def how_many(kept, total, what="pairs"):
    """A text that says how many of the pairs are short enough, and warns if over a tenth are not."""
    return f"{kept} {what} ({total - kept} too long)" if total - kept <= total / 10 else (
        f"{kept} {what}; WARNING: {total - kept} OF {total} ARE TOO LONG AND LEFT OUT")

def check_context(rows, model, folder, mend="set a smaller --max_length"):
    """Raise a Problem if a chat is longer than the model's context or has a token that it does not know."""
    longest = max(len(row.trunk) + len(branch) for row in rows for branch in row.branches)
    if longest > model.context:
        raise Problem(f"{folder}: a chat of {longest} tokens does not fit into its context of "
                      f"{model.context}; leave it out or {mend}")
    vocabulary = model.config.get_text_config().vocab_size
    if max(max(ids) for row in rows for ids in (row.trunk, *row.branches) if len(ids)) >= vocabulary:
        raise Problem(f"{folder}: the tokenizer has more tokens than the model's {vocabulary}")

def collate(rows, device="cpu"):
    """Lay the tokens of rows end to end, as one sequence of T tokens. Returns a dict:

    inputs: what the model gets. input_ids and position_ids are (1, T); the positions of each branch continue
    those of the trunk. For chats and places see `attention`.
    targets, sources, owners (N,): of each of the N tokens in branches, the token, the index in the sequence
    of the token that predicts it, and the number of its answer.
    last (answers,): the index of the last token of each answer."""
    ids, positions, chats, targets, sources, owners = [], [], [], [], [], []
    for trunk, branches in rows:
        shared = range(len(ids), len(ids) + len(trunk))
        ids += trunk
        positions += range(len(trunk))
        for branch in branches:
            chat = [*shared, *range(len(ids), len(ids) + len(branch))]
            ids += branch
            positions += range(len(trunk), len(chat))
            targets += branch
            sources += chat[len(trunk) - 1:len(chat) - 1]
            owners += [len(chats)] * len(branch)
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
    """Chats as lists of indices into a sequence of `tokens` tokens -> (groups, places), for `attention`.
    groups: for each group of TOGETHER chats of like length an array (C, L) of indices. Shorter chats are
    padded by repeating their last token. Attention is causal, so the padding changes nothing before it.
    places (tokens,): lay all groups end to end; then the token with index i stands at places[i]."""
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
    """Causal attention within each chat of a packed sequence: query (1, heads, T, D), key and value (1,
    kv_heads, T, D) -> (1, T, heads, D). transformers calls it in each layer, as the attention "packed".
    chats, places: of `group_chats`, as tensors. sliding_window: how many tokens a token sees, with itself.
    kept: a list to which the keys and values are added, for the sampler's prefill. attend: a function that
    attends instead of this one, for the sampler's decoding step."""
    for name, option in {"attention_mask": attention_mask, **options}.items():
        if name not in HARMLESS and option is not None:
            raise Problem(f"its attention uses {name}")
    if attend is not None:
        return attend(query, key, value, scaling, sliding_window), None
    if chats is None:
        raise Problem("its attention does not get the chats that share a sequence")
    if kept is not None:
        kept.append((key[0], value[0]))
    results = []
    for group in chats:
        q, k, v = (x[0].transpose(0, 1)[group].transpose(1, 2) for x in (query, key, value))  # (C, …, L, D)
        if sliding_window and sliding_window < q.shape[2]:  # with a dense mask, so not faster
            k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))  # a mask and GQA: a slow kernel
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
    """The model without its head."""
    return (model.base_model if model.base_model is not model else model.model).get_decoder()

def hidden_states(model, packed):
    """The last hidden states (T, H) of a packed sequence (`collate`)."""
    return decoder(model)(**packed["inputs"], use_cache=False).last_hidden_state[0]

def response_logits(model, packed):
    """Logits (N, V) that predict the tokens of the responses, computed by the model's own forward."""
    return model(**packed["inputs"], use_cache=False, logits_to_keep=packed["sources"]).logits[0]

# ---------------------------------------------------------------- log-probabilities
class TokenLogps(torch.autograd.Function):
    """Hidden states (N, H), head (V, H), targets (N,) -> log-probabilities (N,) in fp32. The definition is

        logits = (hidden @ head.T).float()                                  # (N, V)
        logps = logits.log_softmax(-1)
        return logps.gather(1, targets[:, None])[:, 0]

    At a vocabulary of 128k these logits would be the largest tensor of the whole training. So this goes over
    the vocabulary tile by tile, and the backward pass computes the logits again, unless there was one tile.
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
    """The targets' columns (N, 1) in the tile that begins with token `at`, and whether they are in it."""
    column = targets - at
    inside = (column >= 0) & (column < logits.shape[1])
    return (column * inside)[:, None], inside

"""Many answers in one forward pass, every prompt once and without padding tokens.

A Row is a prompt (the trunk) with its answers (the branches): the two of a pair, or five samples. `collate`
lays the tokens of many rows end to end as one sequence. Everything in a transformer but attention treats
tokens one by one, so attention alone must know where a chat begins and ends: it takes the chats apart again,
attends in each as usual and puts the results back. Models know it by the name "packed", which models.py
gives them; models in which tokens meet in other ways, such as state-space layers, are refused there.
tests/test_packing.py holds all of it to separate sequences.

Left out on purpose: kernels of our own; attention windows, sinks and caps.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import Problem, encode_chat, quiet

LOGITS = 2**23  # logits in memory at a time (32 MB in fp32)
TOGETHER = 8  # chats of like lengths that attend in one call, padded to the longest of them


class Row(NamedTuple):
    trunk: list     # tokens shared by all answers: the prompt
    branches: list  # per answer, its tokens after the trunk
    starts: list    # per answer, the index in its branch where the response begins

    def __len__(self):
        return len(self.trunk) + sum(map(len, self.branches))


def pack(chats):
    """Answers to one prompt as a Row: their common beginning once, never further than the first response."""
    trunk = chats[0].ids[:min(chat.start for chat in chats)]
    for chat in chats[1:]:
        same = next((i for i, (a, b) in enumerate(zip(trunk, chat.ids)) if a != b), len(trunk))
        trunk = trunk[:same]
    cut = len(trunk)
    return Row(trunk, [chat.ids[cut:] for chat in chats], [chat.start - cut for chat in chats])


def alone(ids):
    """A chat without siblings as a Row."""
    return Row(ids, [[]], [0])


def pair_rows(tokenizer, pairs, max_length, unfinished=False):
    """Preference pairs -> (rows of two branches, chosen first; the pairs of these rows). Pairs of which
    either side is longer than `max_length` tokens are left out; if all are, that is a Problem.

    `unfinished`: a response that was cut off carries no stop token (policy training); else every answer ends
    properly, with the whole of the template, as reward models expect.
    """
    rows, kept = [], []
    for pair in tqdm(pairs, desc="tokens", leave=False, disable=quiet()):
        chats = [encode_chat(tokenizer, pair["prompt"], pair[side],
                             pair.get(f"{side}_finished", True) or not unfinished, whole=not unfinished)
                 for side in ("chosen", "rejected")]
        if max(len(chat.ids) for chat in chats) <= max_length \
                and all(chat.start < len(chat.ids) for chat in chats):
            rows.append(pack(chats))
            kept.append(pair)
    if not rows:
        raise Problem(f"none of {len(pairs)} pairs is short enough for --max_length {max_length}")
    return rows, kept


def collate(rows, device="cpu"):
    """Rows to one sequence of T tokens, as a dict.

    inputs: for the model. input_ids, position_ids (1, T): positions go on from the trunk in every branch;
    chats, places: see `attention`.
    targets, sources, owners (N,): the responses' tokens, the index into T of the token that predicts each,
    and the number of the answer that each belongs to.
    last (answers,): index of each answer's last token.
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
    order = sorted(range(len(chats)), key=lambda c: len(chats[c]))
    groups, places, filled = [], np.zeros(len(ids), np.int64), 0
    for at in range(0, len(order), TOGETHER):
        group = [chats[c] for c in order[at:at + TOGETHER]]
        index = np.stack([np.resize(chat, len(group[-1])) for chat in group])  # a short one begins again:
        for number, chat in enumerate(group):                                  # nobody looks ahead at that
            places[chat] = filled + number * index.shape[1] + np.arange(len(chat))
        groups.append(torch.as_tensor(index, device=device))
        filled += index.size

    def tensor(values):
        return torch.tensor(values, dtype=torch.long, device=device)

    no_mask = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=device)  # 4 dimensions: transformers makes none
    inputs = dict(input_ids=tensor([ids]), position_ids=tensor([positions]), attention_mask=no_mask,
                  chats=groups, places=torch.as_tensor(places, device=device))
    return dict(inputs=inputs, targets=tensor(targets), sources=tensor(sources), owners=tensor(owners),
                last=tensor([chat[-1] for chat in chats]))


def attention(module, query, key, value, attention_mask, scaling=None, chats=None, places=None, slots=None,
              **options):
    """Causal attention within each chat of a packed sequence. The sampler's steps come with `slots`
    (sampler.Slots) instead, and calls with neither get transformers' own attention.

    query (1, heads, T, D); key, value (1, kv_heads, T, D).
    chats: per group (C, L), the indices into T of the tokens of C chats. places (T,): where each token finds
    its result among those of all groups (a trunk's are the same in all its chats). Returns (1, T, heads, D).
    """
    if chats is None and slots is None:
        if attention_mask is not None and not attention_mask.numel():  # it is collate's: chats were given
            raise Problem(f"{module.config.model_type} models tell their attention nothing of who shares a "
                          "sequence, so they are not supported")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    for name in ("softcap", "s_aux", "sinks", "position_bias", "indices"):
        if options.get(name) is not None:
            raise Problem(f"{module.config.model_type} models have {name} in their attention, "
                          "which is not supported")
    if slots is not None:
        return slots.attend(module.layer_idx, query, key, value, scaling), None
    results = []
    for chat in chats:
        q, k, v = (x[0].transpose(0, 1)[chat].transpose(1, 2) for x in (query, key, value))  # (C, …, L, D)
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        results.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(results)[places][None], None


AttentionInterface.register("packed", attention)
AttentionMaskInterface.register("packed", sdpa_mask)  # for calls without chats


# ---------------------------------------------------------------- log-probabilities
class ResponseLogps(torch.nn.Module):
    """A causal LM as a function from packed rows (`collate`) to log π(y|x) of each answer, fp32."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, packed):
        hidden = self.model.base_model(**packed["inputs"], use_cache=False).last_hidden_state
        hidden = hidden[0][packed["sources"]]  # (N, H): positions that predict a response token
        head = self.model.get_output_embeddings().weight
        logps = TokenLogps.apply(hidden, head, packed["targets"])  # (N,)
        return torch.zeros(len(packed["last"]), device=logps.device).index_add(0, packed["owners"], logps)


class TokenLogps(torch.autograd.Function):
    """(N, H) hidden states, (V, H) head, (N,) targets -> (N,) fp32 log-probabilities: log_softmax and gather,
    a tile of the vocabulary at a time. The logits of all tokens never exist at once; the backward pass
    computes them again, unless they fitted into one tile."""
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

"""Many answers in one forward pass, every prompt once and without padding tokens.

A Row is a prompt (the trunk) with its answers (the branches): the two of a pair, or five samples. `collate`
lays the tokens of many rows end to end as one sequence. Everything in a transformer but attention treats
tokens one by one, so attention alone must know where a chat begins and ends: it takes the chats apart again,
attends in each as usual and puts the results back. Models know it by the name "packed", which parallel.py
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
    """Rows of two branches, chosen first; pairs of which either side is longer than `max_length` tokens
    are left out.

    `unfinished`: a response that was cut off carries no stop token (policy training); else every answer ends
    properly, with the whole of the template, as reward models expect.
    Returns (rows, number left out).
    """
    rows = []
    for pair in tqdm(pairs, desc="tokens", leave=False, disable=quiet()):
        chats = [encode_chat(tokenizer, pair["prompt"], pair[side],
                             pair.get(f"{side}_finished", True) or not unfinished, whole=not unfinished)
                 for side in ("chosen", "rejected")]
        if max(len(chat.ids) for chat in chats) <= max_length \
                and all(chat.start < len(chat.ids) for chat in chats):
            rows.append(pack(chats))
    return rows, len(pairs) - len(rows)


def collate(rows, device="cpu"):
    """Rows to one batch of T tokens.

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

"""Many answers in one forward pass, every prompt once and without padding tokens.

A Row is a prompt (the trunk) with its answers (the branches): the two of a pair, or five samples. `collate`
lays the tokens of many rows end to end as one sequence. Everything in a transformer but attention treats
tokens one by one, so attention alone must know where a chat begins and ends: it takes the chats apart again,
attends in each as usual and puts the results back (attention.py). At its first use every model is held to
plain forward passes of itself (`verify`), and those in which tokens meet in other ways are refused.
"""
from array import array
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import attention  # noqa: F401  (registers itself as "packed")
from data import Problem, encode_chat, first_line
from parallel import dealt, decoder

LOGITS = 2**23  # logits in memory at a time (32 MB in fp32)
TOGETHER = 8  # chats of like lengths that attend in one call, padded to the longest of them


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
        same = next((i for i, (a, b) in enumerate(zip(trunk, chat.ids)) if a != b), len(trunk))
        trunk = trunk[:same]
    cut = len(trunk)
    return Row(trunk, [chat.ids[cut:] for chat in chats], [chat.start - cut for chat in chats])


def alone(ids):
    """A chat without siblings as a Row."""
    return Row(ids, [ids[:0]], [0])


def pair_rows(tokenizer, pairs, max_length, unfinished=False):
    """Preference pairs -> (rows of two branches, chosen first; the pairs of these rows). Pairs of which
    either side is longer than `max_length` tokens are left out; if all are, that is a Problem.

    `unfinished`: a response that was cut off carries no stop token (policy training); else every answer ends
    properly, with the whole of the template, as reward models expect.
    """
    def encode(number):
        pair = pairs[number]
        chats = [encode_chat(tokenizer, pair["prompt"], pair[side],
                             pair.get(f"{side}_finished", True) or not unfinished, whole=not unfinished)
                 for side in ("chosen", "rejected")]
        if max(len(chat.ids) for chat in chats) <= max_length \
                and all(chat.start < len(chat.ids) for chat in chats):
            return pack(chats)

    rows = dealt(len(pairs), encode, "tokens")
    kept = [pair for pair, row in zip(pairs, rows) if row]
    if not kept:
        raise Problem(f"none of {len(pairs)} pairs is short enough for --max_length {max_length}")
    return [row for row in rows if row], kept


def collate(rows, device="cpu"):
    """Rows to one sequence of T tokens, as a dict.

    inputs: for the model. input_ids, position_ids (1, T): positions go on from the trunk in every branch;
    chats, places: see attention.py.
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


# ---------------------------------------------------------------- held to plain forward passes
def hidden_states(model, packed):
    """(T, H): the last hidden states of a packed sequence, by a model that has been held to plain passes."""
    verify(model)
    return decoder(model)(**packed["inputs"], use_cache=False).last_hidden_state[0]


def own_logits(model, packed):
    """(N, V) logits for the tokens of the responses, by the model's own way from its hidden states."""
    return model(**packed["inputs"], use_cache=False, logits_to_keep=packed["sources"]).logits[0]


def plain(model, ids):
    """(L, H) hidden states and logits of one chat, by a forward pass with transformers' own attention."""
    seen = []
    hook = decoder(model).register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state[0]))
    model.set_attn_implementation("sdpa")
    try:
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation("packed")
        hook.remove()
    return seen[0], logits


def probe_rows(model):
    """Four chats of random tokens: two with one trunk, a short one and, if the context allows, a long one."""
    config, rng = model.config.get_text_config(), np.random.default_rng(0)
    tokens = np.setdiff1d(np.arange(config.vocab_size), [config.pad_token_id or 0])
    long = min(200, config.max_position_embeddings, getattr(model, "context", 200))
    return [Row(rng.choice(tokens, trunk).tolist(), [rng.choice(tokens, n).tolist() for n in branches],
                [0] * len(branches)) for trunk, branches in ((7, (5, 9)), (1, (11,)), (1, (long - 1,)))]


@contextmanager
def trial(model, part):
    """What is raised inside becomes a Problem that names the part. Attention windows are 6 tokens meanwhile:
    so short chats reach beyond them."""
    narrow = [(owner, owner.sliding_window) for owner in (model.config.get_text_config(), *model.modules())
              if isinstance(getattr(owner, "sliding_window", None), int)]
    try:
        for owner, _ in narrow:
            owner.sliding_window = 6
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Problem(f"{model.name_or_path}: {model.config.model_type} models are not supported: "
                      f"{part}: {first_line(error)}") from None
    finally:
        for owner, window in narrow:
            owner.sliding_window = window


def off(ours, theirs, size=None):
    """By how much `ours` is another than `theirs`, in units of `size` (by default theirs)."""
    size = theirs.float().norm() if size is None else size
    return (ours.float() - theirs.float()).norm() / size.clamp(min=1e-30)


def compare(ours, theirs, size=None):
    """Raises where `ours` is another than `theirs` by more than rounding."""
    if not theirs.isfinite().all():
        raise Problem("NaN or infinite numbers")
    difference = off(ours, theirs, size)
    if not difference <= (1e-4 if theirs.dtype == torch.float32 else 0.1):
        raise Problem(f"off by {100 * difference:.2g}% from plain forward passes")


@torch.no_grad()
def verify(model):
    """At a model's first use, by the processes and in the shards that use it: hold packed attention and the
    head to plain forward passes; where they differ a Problem is raised. Sets model.plain_head: whether logits
    are nothing but hidden states times a matrix."""
    if hasattr(model, "plain_head"):
        return
    for name, weight in model.named_parameters():
        weight = weight.to_local() if hasattr(weight, "to_local") else weight
        if not weight.sum(dtype=torch.float32).isfinite():
            raise Problem(f"{model.name_or_path}: damaged weights: NaN or infinite numbers in {name}")
    rows = probe_rows(model)
    packed = collate(rows, model.device)
    with trial(model, "packed attention"):
        hidden, logits = zip(*(plain(model, row.trunk + branch) for row in rows for branch in row.branches))
        cuts = [len(row.trunk) - 1 for row in rows for _ in row.branches]
        ours = decoder(model)(**packed["inputs"], use_cache=False).last_hidden_state[0][packed["sources"]]
        compare(ours, torch.cat([h[cut:-1] for cut, h in zip(cuts, hidden)]))
    with trial(model, "head"):
        if hasattr(model, "score"):
            last, weight = torch.stack([h[-1] for h in hidden]).float(), model.score.weight.float()
            size = last.norm() * weight.norm() / weight.numel()**0.5  # of a product without meaning
            compare(F.linear(last, weight), torch.stack(logits), size)
            head = False
        else:
            head = model.get_output_embeddings()
            rounding = 1e-6 if logits[0].dtype == torch.float32 else 5e-3  # of kernels for other shapes
            head = head.bias is None and off(F.linear(hidden[0], head.weight), logits[0]).item() < rounding
            if not head:
                compare(own_logits(model, packed), torch.cat([x[cut:-1] for cut, x in zip(cuts, logits)]))
    model.plain_head = head


# ---------------------------------------------------------------- log-probabilities
class ResponseLogps(torch.nn.Module):
    """A causal LM as a function from packed rows (`collate`) to log π(y|x) of each answer, fp32."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, packed):
        verify(self.model)
        if self.model.plain_head:
            hidden = hidden_states(self.model, packed)
            hidden = hidden[packed["sources"]]  # (N, H): positions that predict a response token
            head = self.model.get_output_embeddings().weight
            logps = TokenLogps.apply(hidden, head, packed["targets"])  # (N,)
        else:  # slower, and the logits of all tokens exist at once
            logits = own_logits(self.model, packed).float()
            logps = -F.cross_entropy(logits, packed["targets"], reduction="none")
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

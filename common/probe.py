"""At the first use of a model, check that it computes the same packed as in plain forward passes.

Packing and the sampler's cache rely on attention being the only place where tokens meet, and replace the
model's attention by our own. A model of which this isn't true computes other hidden states and is refused in
one line (docs/models.md). The check runs in the processes, and on the shards, that then use the model.
"""
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from common.data import first_line
from common.packing import Row, collate, decoder, hidden_states, response_logits
from common.parallel import Problem

def plain_pass(model, ids):
    """Hidden states (L, H) and logits (L, V) of one chat, by a forward pass with transformers' attention."""
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
    """Four chats of random tokens: two with a common trunk, a short one, and a long one if it fits."""
    config, rng = model.config.get_text_config(), np.random.default_rng(0)
    tokens = np.setdiff1d(np.arange(config.vocab_size), [config.pad_token_id or 0])
    long = min(64, config.max_position_embeddings, getattr(model, "context", 64))
    return [Row(rng.choice(tokens, trunk).tolist(), [rng.choice(tokens, n).tolist() for n in branches])
            for trunk, branches in ((7, (5, 9)), (1, (11,)), (1, (long - 1,)))]

@contextmanager
def trial(model, part):
    """Turn any error inside into a Problem. Sliding windows have 6 tokens, so that short chats test them."""
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
    """The norm of ours − theirs, relative to `size` (default: the norm of theirs)."""
    size = theirs.float().norm() if size is None else size
    return (ours.float() - theirs.float()).norm() / size.clamp(min=1e-30)

def compare(ours, theirs, size=None):
    """Raise a Problem if ours and theirs differ by more than rounding."""
    if not theirs.isfinite().all():
        raise Problem("NaN or infinite numbers")
    difference = off(ours, theirs, size)
    if not difference <= (1e-4 if theirs.dtype == torch.float32 else 0.1):
        raise Problem(f"off by {100 * difference:.2g}% from plain forward passes")

@torch.no_grad()
def verify(model):
    """Compare packed attention and the head with plain forward passes at a model's first use. Raise a Problem
    if they differ. Sets model.plain_head: whether logits are just hidden states times a matrix."""
    if hasattr(model, "plain_head"):
        return
    for name, weight in model.named_parameters():
        weight = weight.to_local() if hasattr(weight, "to_local") else weight
        if not weight.sum(dtype=torch.float32).isfinite():
            raise Problem(f"{model.name_or_path}: damaged weights: NaN or infinite numbers in {name}")
    rows = probe_rows(model)
    packed = collate(rows, model.device)
    with trial(model, "packed attention"):
        hidden, logits = zip(*(plain_pass(model, r.trunk + branch) for r in rows for branch in r.branches))
        cuts = [len(row.trunk) - 1 for row in rows for _ in row.branches]
        ours = hidden_states(model, packed)[packed["sources"]]
        compare(ours, torch.cat([h[c:-1] for c, h in zip(cuts, hidden)]))
    with trial(model, "head"):
        if hasattr(model, "score"):
            last, weight = torch.stack([h[-1] for h in hidden]).float(), model.score.weight.float()
            size = last.norm() * weight.norm() / weight.numel()**0.5  # of a random head's logits
            compare(F.linear(last, weight), torch.stack(logits), size)
            head = False
        else:
            head = model.get_output_embeddings()
            rounding = 1e-6 if logits[0].dtype == torch.float32 else 5e-3  # by kernels for other shapes
            head = head.bias is None and off(F.linear(hidden[0], head.weight), logits[0]).item() < rounding
            if not head:
                compare(response_logits(model, packed), torch.cat([x[c:-1] for c, x in zip(cuts, logits)]))
    model.plain_head = head

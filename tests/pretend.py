"""Trains, samples and scores on the CPU and on a pretend accelerator, and prints all results as JSON.

    python tests/pretend.py POLICY RM PAIRS OUT

test_device.py runs it, to find code that would fail on a GPU for want of a copy between devices. Tensors on
the device `pretend` hold their numbers in CPU storages, and the CPU computes every operation on them. An
operation on tensors of two devices is refused, as on CUDA. Sampling and scoring also run in bf16 there. This
is a script, since a device cannot be unregistered in a process.
"""
import contextlib
import json
import sys
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dpo  # noqa: E402
import reward  # noqa: E402
import sampler  # noqa: E402
from common import models, packing, parallel  # noqa: E402
from common.data import load_tokenizer, read_jsonl, read_pairs  # noqa: E402

DTYPES = {int: torch.int64, float: torch.float64}
COPIES = ("aten::_to_copy", "aten::_copy_from", "aten::copy_")
META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
NUMBERS = {}  # storage of a pretend tensor -> a CPU tensor with its numbers

def numbers_of(x):
    """The numbers of a pretend tensor, as a view of the CPU tensor that holds them."""
    return NUMBERS[x.untyped_storage()._cdata].as_strided(x.shape, x.stride(), x.storage_offset())

def pretend(numbers):
    """A new pretend tensor with a copy of these numbers."""
    made = torch._C._acc.create_empty_tensor(numbers.shape, numbers.dtype)
    NUMBERS[made.untyped_storage()._cdata] = numbers.clone(memory_format=torch.contiguous_format)
    return made

def on_the_cpu(op, *args, **kwargs):
    """Compute an operation on pretend tensors on the CPU; torch calls it for the PrivateUse1 key."""
    name, given, others = op._schema.name, {}, []

    def numbers(x):
        if x.device.type != "pretend":
            others.append(x)
            return x
        found = numbers_of(x)
        given[found.untyped_storage()._cdata] = x
        same[id(found)] = found, x
        return found

    def wrapped(x):
        if id(x) in same:
            return same[id(x)][1]
        if x.untyped_storage()._cdata in given:  # a view of an input
            return torch.ops.aten.as_strided.default.redispatch(
                META, given[x.untyped_storage()._cdata], x.shape, x.stride(), x.storage_offset())
        return pretend(x)

    same = {}
    to = torch.device(kwargs.get("device") or "pretend")
    if "device" in kwargs:
        kwargs["device"] = "cpu"
    args, kwargs = tree_map_only(torch.Tensor, numbers, (args, kwargs))
    if any(x.dim() for x in others) and name not in COPIES:
        raise RuntimeError(f"{name}: tensors on two devices")
    if name == "aten::_copy_from":
        return args[1].copy_(args[0])
    args = [torch.tensor(x, dtype=DTYPES[type(x)]) if type(x) in DTYPES and str(field.type) == "Tensor"
            else x for x, field in zip(args, op._schema.arguments)]  # CPU kernels want tensors there
    if op is torch.ops.aten.bmm.dtype:  # CPUs have no bmm with an output dtype
        op, args = torch.ops.aten.bmm.default, [x.to(args[2]) for x in args[:2]]
    result = op(*args, **kwargs)
    for found, x in same.values():
        if x.shape != found.shape:  # an `out` argument that was resized
            x.data = pretend(found)
    if to.type == "cpu":
        return result
    return tree_map_only(torch.Tensor, wrapped, result)

def train(policy, rm, pairs):
    """Train both models; returns the lines of both logs."""
    lines = []
    settings = dict(lr=1e-3, batch=8, micro_batch=4, max_length=64, log=lambda **line: lines.append(line))
    for _ in dpo.train(policy, pairs, beta=0.1, **settings):
        pass
    reward.train(rm, pairs, **settings)
    return lines

def sample(policy, pairs, path):
    sampler.sample(policy, [pair["prompt"] for pair in pairs], path, samples=3, seed="0", temperature=0.8,
                   top_p=0.95, max_new_tokens=10, rows=16)
    return read_jsonl(path)

@torch.no_grad()
def inference(policy, rm, pairs, samples):
    """Log-probabilities of the pairs' answers and rewards of the samples, with models as sampling and scoring
    load them."""
    model = dpo.ResponseLogps(parallel.replicate(models.load_policy(policy)))
    rows, _ = packing.pair_rows(load_tokenizer(policy), pairs, 64)
    scorer, tokenizer = reward.load(rm)
    return dict(logps=dpo.pair_logps(model, rows, range(len(rows))).tolist(), dtype=str(model.model.dtype),
                rewards=reward.score_answers(scorer, tokenizer, [
                    (row["prompt"], [row["response"]]) for row in samples], 8))

def main():
    policy, rm, pairs, out = sys.argv[1:]
    pairs, out, found, cpu = read_pairs(pairs), Path(out), {}, parallel.device
    _setup_privateuseone_for_python_backend("pretend")
    library = torch.library.Library("_", "IMPL")
    library.fallback(on_the_cpu, "PrivateUse1")
    for where in ("cpu", "pretend", "bf16"):
        if where == "pretend":
            for module in [m for m in sys.modules.values() if getattr(m, "device", None) is cpu]:
                module.device = lambda: torch.device("pretend")
            models.device = cpu  # models.py takes its dtype from the device: keep fp32 for now
        elif where == "bf16":
            models.device = parallel.device
        found[where] = dict(lines=train(policy, rm, pairs) if where != "bf16" else [],
                            samples=sample(policy, pairs, out / f"{where}.jsonl"))
        found[where] |= inference(policy, rm, pairs, found["cpu"]["samples"])

    found["went through"] = []  # operations on two devices that were not refused
    one, other = torch.zeros(2, 2, device=parallel.device()), torch.zeros(2, 2)
    for mixed in (torch.add, torch.matmul, lambda x, y: torch.embedding(x, y.long())):
        with contextlib.suppress(RuntimeError):
            found["went through"].append(str(mixed(one, other)))
    print(json.dumps(found))

if __name__ == "__main__":
    main()

"""Processes, shards and files: everything that `dpo.py` and `reward.py` share and that is not the method.

The same code runs under plain `python`, `torchrun` on CPUs (gloo) and `torchrun` on GPUs (nccl), over several
nodes that share a file system. Training is FSDP2: decoder layers, then the root; fp32 masters with bf16
compute on GPUs, fp32 on CPUs; one process on a CPU is not sharded at all. Sampling and scoring use a plain
replica in each process.

Left out on purpose: tensor, pipeline and context parallelism, CPU offload, saving in the middle of an epoch.
"""
import argparse
import functools
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import chain
from pathlib import Path

# ruff: noqa: E402
gc.disable()  # what imports make stays: looking through it again and again would take 0.6 s

import numpy as np
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    HfArgumentParser,
)

import packing  # noqa: F401  (registers the attention)
from data import Problem, first_line, load_tokenizer, read_jsonl, write_jsonl

gc.enable()


# ---------------------------------------------------------------- processes
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def device():
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def barrier():
    if world() > 1:
        dist.barrier()


def from_rank0(value):
    """What rank 0 says, in every process."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def say(*words):
    """Only rank 0 speaks."""
    if rank() == 0:
        print(*words, flush=True)


def _start():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise Problem(f"{local_world} processes, but {torch.cuda.device_count()} GPUs; "
                          "set torchrun's --nproc-per-node")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif "OMP_NUM_THREADS" not in os.environ:
        # more than the cores is far slower
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = timedelta(hours=6)  # a process that has no block left waits for the others' last ones
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend, timeout=patience)
    elif torch.cuda.is_available():  # a group of one, for FSDP's bf16
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def launch(main, *arguments):
    """Run a script's main() in its process group; what a user can mend is one line and exit code 2."""
    try:
        _start()
        gc.freeze()  # what imports made stays; looking through it costs 0.2 s for every model loaded
        main(*arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Problem, OSError, torch.cuda.OutOfMemoryError) as error:
        if rank() > 0:
            time.sleep(3)  # most problems are everybody's: rank 0 has spoken, and torchrun ends the others
        if isinstance(error, torch.cuda.OutOfMemoryError):
            error = ("out of GPU memory; run the same command with a smaller --sample_batch, "
                     f"--score_batch or --micro_batch ({first_line(error)})")
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # no waiting for processes that are inside a collective
    except KeyboardInterrupt:
        os._exit(130)


def parse(options, words=None, **defaults):
    """The command line (or `words`) as the dataclass `options`; `defaults` replace the dataclass's own."""
    def complain(message):
        raise Problem(f"{message} (see --help)")
    parser = HfArgumentParser(options, description=sys.modules[options.__module__].__doc__,
                              allow_abbrev=False, formatter_class=_Help)
    parser.error = complain
    parser.set_defaults(**defaults)
    chosen, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        complain(f"unknown: {' '.join(unknown)}")
    for name, value in vars(chosen).items():
        if type(value) in (int, float) and name not in ("seed", "tau") and (
                value < 0 or value == 0 and name not in ("temperature", "select_prompts")
                or value > 1 and name == "top_p"):
            complain(f"--{name} {value} makes no sense")
    return chosen


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


# ---------------------------------------------------------------- files
def exists(path):
    """Rank 0's view, so that no process decides otherwise."""
    return from_rank0(Path(path).exists())


@contextmanager
def writing(path):
    """A temporary name for all processes to write to, renamed to `path` at the end: what exists is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    barrier()
    yield temporary
    barrier()
    if rank() == 0:
        os.replace(temporary, path)
    barrier()


def remove(path):
    path = Path(path)
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def move_up(folder, out):
    """A finished model's files from out/… to `out`, config last: a folder with a config.json is complete."""
    if rank() == 0:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, out / path.name)
        remove(out / folder.relative_to(out).parts[0])
    barrier()


ROUNDING = ("sample_batch", "score_batch", "micro_batch", "recompute")  # options that change nothing else


def claim(path, options, file=False, **more):
    """Note down which configuration `path` belongs to; another one is refused with the differences listed.

    file: whether `path` is a JSONL file, else it is a folder. A run may go on with other batch sizes.
    """
    path = Path(path)
    if (path.suffix == ".jsonl") != file:
        raise Problem(f"--out {path}: " + ("a file is written; its name must end in .jsonl" if file else
                                           "a folder is written; its name must not end in .jsonl"))
    note = path.with_name(path.name + ".run.json") if path.suffix == ".jsonl" else path / "run.json"
    settings = {k: v for k, v in asdict(options).items() if k != "out"}
    files = [path, parts_of(path)] if path.suffix == ".jsonl" else path.glob("[!.]*")
    results = [p for p in files if p.exists() and p.name not in (note.name, "metrics.jsonl")]
    if rank() == 0 and note.exists() and results:  # without them, of a failed start
        try:
            old = json.loads(note.read_text())["settings"]
        except (ValueError, LookupError, TypeError):
            raise Problem(f"{note} is damaged; choose another --out") from None
        changed = [f"{k}: {old.get(k)!r} there, {settings.get(k)!r} now"
                   for k in {**old, **settings} if old.get(k) != settings.get(k) and k not in ROUNDING]
        if changed:
            raise Problem(f"{path} belongs to another run; choose another --out ({'; '.join(changed)})")
    elif rank() == 0:
        if results:
            raise Problem(f"{path} exists and was not written by this command; choose another --out")
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".{note.name}.tmp")
        value = {"settings": settings, **more, "versions": versions()}
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, note)
    barrier()


def versions():
    names = {"python": sys.version.split()[0], "torch": torch.__version__,
             "transformers": transformers.__version__, "numpy": np.__version__,
             "processes": world(), "device": str(device())}
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True,
                         cwd=Path(__file__).parent, capture_output=True) if shutil.which("git") else None
    return {**names, "commit": git.stdout.strip() if git and git.returncode == 0 else None}


class Log:
    """One line per optimiser step on the screen, one JSON line per event in a file. Rank 0 only.

    Lines of the same phase from an earlier, broken-off attempt are removed first.
    """
    def __init__(self, path, phase):
        self.path, self.phase = Path(path), phase
        if rank() == 0 and self.path.exists():
            lines = self.path.read_text().splitlines(True)
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
            temporary.write_text("".join(line for line in whole if json.loads(line)["phase"] != phase))
            os.replace(temporary, self.path)

    def __call__(self, shown="", **values):
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"phase": self.phase, **values}) + "\n")
            if shown:
                print(f"{self.phase}  " + shown.format(**values), flush=True)


# ---------------------------------------------------------------- models
def local_folder(name):
    """The folder of a model: `name` itself, or the snapshot of a hub id (safetensors only)."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise Problem(f"{name}: no such folder")
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    try:
        if rank() == 0:
            snapshot_download(name, allow_patterns=patterns)
        barrier()
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:
        raise Problem(f"{name}: no such folder, and not to be had from the hub "
                      f"({first_line(error)})") from None


def load_policy(folder, training=False):
    """A causal LM; in every process, but only rank 0's copy has weights until `replicate` or `shard`."""
    config = _config(folder)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise Problem(f"{folder}: {config.model_type} models change their logits ({name}), "
                          "which is not supported")
    model = _load(AutoModelForCausalLM, folder, config, training)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise Problem(f"{folder}: its head has a bias, which is not supported")
    return model


def check_reward(folder, fresh_head=False):
    """Refuse, by its config, a model with a head of several labels, or with none unless `fresh_head`;
    returns the config."""
    config = _config(folder)
    kind = (config.architectures or ["?"])[0]
    if not kind.endswith("ForSequenceClassification"):
        if not fresh_head:
            raise Problem(f"{folder}: {kind} has no reward head; "
                          f"train one: python reward.py --model {folder} --pairs …")
        say(f"{folder} is a {kind}: training starts with a fresh reward head")
    elif config.num_labels != 1:
        raise Problem(f"{folder}: its head has {config.num_labels} labels; a reward model has one")
    return config


def load_reward(folder, training=False, fresh_head=False, seed=0):
    """A sequence classifier with one logit. `fresh_head`: a causal LM is taken too and gets a new head."""
    config = check_reward(folder, fresh_head)
    config.num_labels = 1
    torch.manual_seed(seed)  # the fresh head's
    model = _load(AutoModelForSequenceClassification, folder, config, training)
    if not hasattr(model, "score"):
        raise Problem(f"{folder}: {type(model).__name__} has no linear head `score`, which is not supported")
    return model


def _config(folder):
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise Problem(f"{folder}: not a model folder ({first_line(error)})") from None
    if getattr(config, "attn_logit_softcapping", None):
        raise Problem(f"{folder}: {config.model_type} models cap their attention's logits, "
                      "which is not supported")
    return config


def context_of(folder, config=None):
    """The longest sequence in tokens: all positions, or one attention window (our attention knows none)."""
    config = config or _config(folder)
    if not hasattr(config, "max_position_embeddings"):
        raise Problem(f"{folder}: {config.model_type} models are not supported (no max_position_embeddings)")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(config.max_position_embeddings, window or math.inf)


def _load(kind, folder, config, training):
    gc.collect()  # sharded models hold on to themselves: make room for the next one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stored = config.dtype or torch.float32
    dtype = torch.float32 if training or device().type == "cpu" else torch.bfloat16
    try:
        if rank() == 0:
            model, info = kind.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa",
                                               use_safetensors=True, output_loading_info=True)
            missing = [name for name in info["missing_keys"] if not name.startswith("score.")
                       or (config.architectures or [""])[0].endswith("ForSequenceClassification")]
            if missing:
                raise ValueError(f"weights are missing: {', '.join(sorted(missing)[:3])}")
        else:
            with torch.device("meta"):
                model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:
        raise Problem(f"{folder}: can't be loaded as a model ({first_line(error)})") from None
    model.set_attn_implementation("packed")  # of packing.py; loading it by that name would not ask for SDPA
    foreign = [name for name, _ in model.named_modules()
               if any(word in name for word in ("mamba", "linear_attn", "conv", "recurrent", "ssm"))]
    if foreign or model.config._attn_implementation != "packed":
        raise Problem(f"{folder}: {config.model_type} models are not supported "
                      f"({foreign[0] if foreign else 'an attention of their own'})")
    model.stored_dtype, model.context = stored, context_of(folder, config)
    return model.eval()  # and so it stays: dropout would make a policy differ from itself as reference


def replicate(model):
    """The whole model in every process, for sampling and scoring; rank 0 read it, the others receive it."""
    if rank() > 0:
        model.to_empty(device=device())
        model.tie_weights()
    model.to(device())
    if world() > 1:
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.data, 0)
    return model


def decoder_layers(model):
    return next(module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList))


def shard(root, recompute=False):
    """FSDP2 over all processes. `root` wraps a model (root.model); only root's forward fires the hooks.

    recompute: gradient checkpointing, a decoder layer's activations are computed again in the backward pass.
    """
    layers = decoder_layers(root.model)
    if recompute:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if not dist.is_initialized():
        return root.to(device())
    weights = root.state_dict() if rank() == 0 else {}
    buffers = [b.clone() if rank() == 0 else torch.empty_like(b, device="cpu") for b in root.buffers()]
    root.to("meta")
    root.model.tie_weights()
    mesh = init_device_mesh(device().type, (world(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if device().type == "cuda" else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)  # embedding, final norm, head, tied or not, in one group
    root.to_empty(device=device())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(root, weights, options=options)
    for ours, rank0s in zip(root.buffers(), buffers):  # RoPE's frequencies are in no checkpoint
        dist.broadcast(rank0s, 0)
        ours.copy_(rank0s)
    return root


def save(root, source, folder):
    """A folder that from_pretrained and vLLM load; tokenizer and template come from the folder `source`.

    Weights are rounded to the precision that `source` had: the next phase starts from what this one used.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(root, options=options) if dist.is_initialized() else root.state_dict()
    model = root.model
    if rank() == 0:
        weights = {name.removeprefix("model."): w.to(model.stored_dtype, copy=True)
                   for name, w in weights.items()}
        if model.config.tie_word_embeddings:
            weights = {name: w for name, w in weights.items() if name not in (model._tied_weights_keys or {})}
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(weights, folder, max_shard_size="5GB")
        model.config.architectures = [type(model).__name__]
        config = model.config.to_dict() | {"dtype": str(model.stored_dtype).removeprefix("torch.")}
        type(model.config).from_dict(config).save_pretrained(folder)
        generation = Path(source) / "generation_config.json"
        if generation.exists() and model.can_generate():
            shutil.copy(generation, folder)
        load_tokenizer(source).save_pretrained(folder)
    barrier()


# ---------------------------------------------------------------- training
def adamw(root, lr):
    return torch.optim.AdamW(root.parameters(), lr=lr, weight_decay=0.0, fused=True)


def cosine(step, steps, warmup=0.1):
    """Factor of the learning rate in step 0 … steps−1: linear warm-up, then half a cosine towards 0."""
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


def batches(lengths, batch, micro_batch, seed, epochs=1):
    """The optimiser steps: per step this process's micro-batches, each [(index, weight)].

    The order is the same in all processes; weights add up to 1 over a step's processes and micro-batches, so
    a weighted sum of losses is the mean over the global batch. Nothing is dropped: the last batch is smaller.
    All processes have the same number of micro-batches, as collectives need, filled up with weight 0.
    """
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        for at in range(0, len(order), batch):
            rows = sorted(order[at:at + batch].tolist(), key=lambda i: (-lengths[i], i))  # like with like
            step, width = [], micro_batch * world()
            for first in range(0, len(rows), width):
                group = rows[first:first + width]
                mine = [(i, 1 / len(rows)) for i in group[rank()::world()]]
                step.append(mine or [(group[0], 0.0)])
            steps.append(step)
    return steps


def clip_and_step(root, optimizer, lr, max_norm=1.0):
    """Clip the gradient to max_norm, take the step, return the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(root.parameters(), max_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def check_finite(step, **values):
    for name, value in values.items():
        if not math.isfinite(value):
            raise Problem(f"the {name} of step {step} is {value}; try a smaller learning rate")


def total(values):
    """Element-wise sum of a {name: tensor or number} over all processes, as floats."""
    vector = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device="cpu")
    if world() > 1:
        dist.all_reduce(vector)
    return dict(zip(values, vector.tolist()))


def parts_of(out):
    """The folder of a JSONL file's blocks while they are made."""
    return Path(out).with_name(f".{Path(out).name}.parts")


def in_blocks(rows, size, out, work, what):
    """Write work(block)'s rows for every block of `size` rows to the JSONL file `out`, processes in turn.

    The blocks don't depend on the number of processes, so neither do the shapes that models see. A block is
    kept as soon as it is done: after an interruption only unfinished blocks are computed again.
    """
    out, parts = Path(out), parts_of(out)
    starts = range(0, len(rows), size)
    mine = [s for s in starts[rank()::world()] if not (parts / f"{size}-{s}.jsonl").exists()]
    for s in tqdm(mine, desc=what, disable=rank() > 0, unit="block", leave=False):
        write_jsonl(parts / f"{size}-{s}.jsonl", work(rows[s:s + size]))
    barrier()
    if rank() == 0:
        write_jsonl(out, chain.from_iterable(read_jsonl(parts / f"{size}-{s}.jsonl") for s in starts))
        remove(parts)
    barrier()

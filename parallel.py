"""Processes and shards: the same code under plain `python`, `torchrun` on CPUs (gloo) and `torchrun` on GPUs
(nccl), over several nodes that share a file system.

Training is FSDP2: decoder layers, then the root; fp32 masters with bf16 compute on GPUs, fp32 on CPUs; one
process on a CPU is not sharded at all. Sampling and scoring use a plain replica in each process.

Left out on purpose: tensor, pipeline and context parallelism, CPU offload.
"""
import ctypes
import functools
import os
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import Problem, quiet


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def device():
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def memory():
    """Bytes that this process's device has: its GPU, or its share of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(device()).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def barrier():
    if world() > 1:
        dist.barrier()


def from_rank0(value):
    """What rank 0 says, in every process."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def dealt(count, work, what):
    """[work(0), …, work(count − 1)], each done by one process and then known to all: for work of the host,
    while accelerators wait. what: it is called on the screen."""
    done, size = [], 4096  # exchanged at a time, since that takes several times the memory
    for at in tqdm(range(0, count, size), desc=what, leave=False, disable=quiet()):
        mine = [work(i) for i in range(at + rank(), min(at + size, count), world())]
        every = [mine] * world()
        if world() > 1:
            dist.all_gather_object(every, mine)
        done += [every[i % world()][i // world()] for i in range(min(size, count - at))]
    return done


def say(*words):
    """Only rank 0 speaks."""
    if rank() == 0:
        print(*words, flush=True)


def start():
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
    if not torch.cuda.is_available():
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = timedelta(hours=6)  # a process that has no block left waits for the others' last ones
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend, timeout=patience)
    elif torch.cuda.is_available():  # a group of one, for FSDP's bf16
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def keep_freed_memory():
    """Have glibc keep freed tensors of up to 32 MiB, which it else gives back and fetches anew page by page:
    scoring on a CPU is a fifth faster. Nothing under other libraries of C."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest there is
        libc.mallopt(-1, 10**9)  # M_TRIM_THRESHOLD


# ---------------------------------------------------------------- replicas and shards
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


def decoder(model):
    """A model without its head."""
    body = model.base_model if model.base_model is not model else model.model
    return body.get_decoder()


def decoder_layers(model):
    return next(module for module in decoder(model).modules() if isinstance(module, torch.nn.ModuleList))


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(root, recompute=False):
    """FSDP2 over all processes. `root` wraps a model (root.model); only root's forward fires the hooks.

    recompute: gradient checkpointing, a decoder layer's activations are computed again in the backward pass.
    """
    if not dist.is_initialized():
        wrap(root, recompute)
        return root.to(device())
    weights = root.state_dict() if rank() == 0 else {}
    buffers = [b.clone() if rank() == 0 else torch.empty_like(b, device="cpu") for b in root.buffers()]
    root.to("meta")
    root.model.tie_weights()
    mesh = init_device_mesh(device().type, (world(),))
    wrap(root, recompute, mesh, BF16 if device().type == "cuda" else MixedPrecisionPolicy())
    root.to_empty(device=device())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(root, weights, options=options)
    for ours, rank0s in zip(root.buffers(), buffers):  # RoPE's frequencies are in no checkpoint
        dist.broadcast(rank0s, 0)
        ours.copy_(rank0s)
    return root


def wrap(root, recompute, mesh=None, precision=None):
    """Make the layers recompute and, with a mesh, shards of all parameters."""
    layers = decoder_layers(root.model)
    if recompute:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if mesh:
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(root, mesh=mesh, mp_policy=precision)  # embedding, norm, head: one group, tied or not


def held_whole(parameters, memory, processes, width):
    """What of a sharded model stays whole in every process between the micro-batches of a step, which spares
    communication: (its gradient, its weights, of `width` bytes each).

    A parameter's shard is 16 bytes (fp32: weight, gradient, Adam's two moments) over the number of processes,
    its whole gradient 4 more (fp32). Held is what brings them to two thirds of the memory at most; the rest
    is for activations. 8 B on eight GPUs of 80 GB: the gradient, which makes it 48 GB, and not the weights,
    which would make it 64 of 86.
    """
    room = memory * 2 / 3 / parameters - 16 / processes
    return 4 <= room, 4 + width <= room


def before_micro_batch(model, last, gradient, weights):
    """Have a sharded model do as `held_whole` says, up to the `last` micro-batch of a step."""
    model.set_requires_gradient_sync(last or not gradient)
    if weights:
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(last)

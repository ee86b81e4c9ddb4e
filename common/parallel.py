"""Processes. The same code runs under `python`, under `torchrun` on CPUs (gloo) and under `torchrun` on GPUs
(nccl), also on several nodes that share a file system. To sample and to score, each process has a whole copy
of the model (`replicate`). For training the processes share one (common/training.py).

Left out on purpose: tensor, pipeline and context parallelism.
"""
import ctypes
import os
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

class Problem(Exception):
    """An error that the user can mend. It is shown as one line, and the exit code is 2."""

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def device():
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

def memory():
    """The bytes of memory for this process: those of its GPU, or its share of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(device()).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

def say(*words):
    """Print in rank 0 only."""
    if rank() == 0:
        print(*words, flush=True)

def quiet():
    """For tqdm(disable=…): None in rank 0, which shows a bar if there is a terminal; else True."""
    return rank() > 0 or None

def barrier():
    if world() > 1:
        dist.barrier()

def on_rank0(work, *arguments):
    """Call work(*arguments) in rank 0 alone, and return its result, or raise its Problem, in all processes.
    Every process must call this, and none continues before all have done so."""
    box = [None]
    try:
        box[0] = work(*arguments) if rank() == 0 else None
    except Problem as problem:
        box[0] = problem
    if world() > 1:
        dist.broadcast_object_list(box)
        dist.barrier()  # the broadcast alone lets rank 0 run ahead
    if isinstance(box[0], Problem):
        raise box[0]
    return box[0]

def share_work(count, work, what):
    """Return [work(0), …, work(count − 1)] in all processes. Each is computed by one of them, so this is for
    work of the CPU that takes long, such as tokenising. what: the name on the progress bar."""
    done, size = [], 4096  # results are exchanged in pieces, which takes several times their memory
    for start in tqdm(range(0, count, size), desc=what, leave=False, disable=quiet()):
        end = min(start + size, count)
        mine = [work(i) for i in range(start + rank(), end, world())]
        every = [mine] * world()
        if world() > 1:
            dist.all_gather_object(every, mine)
        done += [every[i % world()][i // world()] for i in range(end - start)]
    return done

def start():
    """Join the process group that torchrun describes. A single process on a CPU needs none."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise Problem(f"{local_world} processes, {torch.cuda.device_count()} GPUs: set --nproc-per-node")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # who has no work left waits for the others
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    elif torch.cuda.is_available():  # a group of one: FSDP is what computes in bf16
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

def keep_freed_memory():
    """Tell glibc to keep the memory of freed tensors of up to 32 MiB: scoring on a CPU is a fifth faster."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries don't have it
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest value
        libc.mallopt(-1, 10**9)  # M_TRIM_THRESHOLD

def replicate(model):
    """Give each process a whole copy of the model. Rank 0 has read its weights and sends them to the rest."""
    if rank() > 0:
        model.to_empty(device=device())
        model.tie_weights()
    model.to(device())
    if world() > 1:
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.data, 0)
    return model

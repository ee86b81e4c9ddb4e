"""Processes: the same code runs under plain `python`, under `torchrun` on CPUs (gloo) and under `torchrun` on
GPUs (nccl), also over several nodes that share a file system. Sampling and scoring hold a whole copy of the
model in every process (`replicate`); training shards it (common/training.py).

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
    """Something that the user can mend. It is shown as one line, and the exit code is 2."""

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def device():
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

def memory():
    """Bytes that this process's device has: its GPU's, or its share of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(device()).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

def say(*words):
    """Print, in rank 0 only."""
    if rank() == 0:
        print(*words, flush=True)

def quiet():
    """tqdm's `disable`: None, which shows a bar in terminals only, in rank 0, and True in other processes."""
    return rank() > 0 or None

def barrier():
    if world() > 1:
        dist.barrier()

def on_rank0(work, *arguments):
    """work(*arguments) by rank 0 alone; its result, or its Problem, reaches every process. No process goes on
    before all have come this far."""
    box = [None]
    try:
        box[0] = work(*arguments) if rank() == 0 else None
    except Problem as problem:
        box[0] = problem
    if world() > 1:
        dist.broadcast_object_list(box)
        dist.barrier()  # rank 0 would not wait for the others otherwise
    if isinstance(box[0], Problem):
        raise box[0]
    return box[0]

def share_work(count, work, what):
    """[work(0), …, work(count − 1)]: each is done by one process, and then all processes know all results. It
    is for work of the CPU, during which accelerators wait. what: the name on the progress bar."""
    done, size = [], 4096  # results are exchanged in pieces, since an exchange takes several times their size
    for start in tqdm(range(0, count, size), desc=what, leave=False, disable=quiet()):
        end = min(start + size, count)
        mine = [work(i) for i in range(start + rank(), end, world())]
        every = [mine] * world()
        if world() > 1:
            dist.all_gather_object(every, mine)
        done += [every[i % world()][i // world()] for i in range(end - start)]
    return done

def start():
    """Join the process group that torchrun describes; alone, without a GPU, there is none."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise Problem(f"{local_world} processes, {torch.cuda.device_count()} GPUs: set --nproc-per-node")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # more threads than cores are far slower
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # one without a block left waits for the others' last ones
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    elif torch.cuda.is_available():  # a group of one, since FSDP is what makes training bf16
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

def keep_freed_memory():
    """Have glibc keep the memory of freed tensors of up to 32 MiB. It would give it back to the system and
    fetch it again, page by page; without that, scoring on a CPU is a fifth faster."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries have none
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest there is
        libc.mallopt(-1, 10**9)  # M_TRIM_THRESHOLD

def replicate(model):
    """The whole model in every process. Rank 0 has read its weights; the others receive them."""
    if rank() > 0:
        model.to_empty(device=device())
        model.tie_weights()
    model.to(device())
    if world() > 1:
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.data, 0)
    return model

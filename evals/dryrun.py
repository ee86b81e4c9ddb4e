"""The training step on tensors without numbers, in a group of processes that isn't there: for plan.py.

What is measured is the code of dpo.py and reward.py under FSDP2, as it would run on GPUs.
"""
import copy
import gc

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo import dpo_loss
from packing import ResponseLogps, Row, collate
from parallel import BF16, before_micro_batch, held_whole, wrap
from reward import Rewards, bradley_terry_loss


def trace(config, kind, gpus, pairs, prompt, answer, recompute, memory):
    """(bytes at the peak of a GPU of so much memory, FLOPs) of the last two micro-batches of a step."""
    policy = kind is AutoModelForCausalLM
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    mesh = init_device_mesh("cpu", (gpus,))  # before the mode: it holds numbers
    with FakeTensorMode():
        config = copy.deepcopy(config)  # it would be told the dtype
        model = kind.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
        model.set_attn_implementation("packed")
        model.plain_head = True  # there is nothing to verify
        root = (ResponseLogps if policy else Rewards)(model)
        wrap(root, recompute, mesh, BF16)
        optimizer = torch.optim.AdamW(root.parameters(), weight_decay=0.0, fused=True)
        packed = collate([Row([0] * prompt, [[0] * answer] * 2, [0, 0])] * pairs)

        held = held_whole(sum(p.numel() for p in root.parameters()), memory, gpus, 2)

        def backward(last):
            before_micro_batch(root, last, *held)
            chosen, rejected = root(packed).view(-1, 2).T
            losses = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0] if policy \
                else bradley_terry_loss(chosen, rejected)
            losses.mean().backward()
            if last:
                torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)

        with FlopCounterMode(display=False) as flops:
            backward(True)
        optimizer.step()  # before the tracker: DTensor tries what is new on tensors of whole shapes
        gc.collect()      # what the counter holds on to
        with FSDPMemTracker(root, optimizer) as tracker:
            backward(False)
            tracker.reset_mod_stats()
            backward(True)
            optimizer.step()
    dist.destroy_process_group()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], flops.get_total_flops()

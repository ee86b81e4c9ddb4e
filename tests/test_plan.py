"""pytest tests/test_plan.py

The plan's hours and bytes are those worked out by hand. Its memory of training agrees with a trace of the
real training step on tensors without numbers. A run that does not fit is refused, with what it needs.
"""
import copy
import gc
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import mt
import sampler
from common import parallel, toy, training
from common.packing import Row, collate
from common.parallel import Problem
from dpo import ResponseLogps, dpo_loss
from evals import plan
from evals.plan import GIB, POLICY, RM
from reward import Rewards, bradley_terry_loss

LLAMA = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, num_labels=1,
             pad_token_id=0, dtype="bfloat16")
LLAMAS = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "3B": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
               tie_word_embeddings=True),
    "tiny": dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
                 vocab_size=200)}

def llama(name, **changes):
    return LlamaConfig(**LLAMA | LLAMAS[name] | changes)

# ---------------------------------------------------------------- by hand
def test_the_size_of_llama_3_8b_is_the_published_one():
    policy, rm = (plan.size_of(llama("8B"), kind) for kind in (POLICY, RM))
    assert policy.params == 8_030_261_248
    assert 6 * policy.matrices == pytest.approx(45.0e9, rel=1e-3)  # FLOPs a token, forward and backward
    head = 128256 * 4096
    assert policy.head == head and rm.head == 0
    assert (rm.params, rm.matrices) == (policy.params - head + 4096, policy.matrices - head + 4096)
    tied = plan.size_of(llama("3B"), POLICY)  # a tied head is stored once, but tokens still multiply it
    assert tied.params == tied.matrices == 3_212_749_824

def test_memory_is_as_worked_out_by_hand(monkeypatch):
    size = plan.size_of(llama("8B"), POLICY)
    parts = plan.sampling(size, 64, 1024, 1024)
    assert parts["cache"] == 64 * 2048 * 131_072  # 32 layers x keys and values x 8 heads x 128 x 2 bytes
    assert plan.rows_of(size, 64, 4000, 80 * GIB) == 64  # 69.8e9 bytes / 2 / 131,072 are 266,000 tokens
    assert plan.rows_of(size, 256, 4000, 80 * GIB) == 66
    config = llama("tiny")  # the sampler agrees, here in fp32
    monkeypatch.setattr(sampler, "memory", lambda: 2 * 10**7)
    model = POLICY.from_config(config, dtype=torch.float32, attn_implementation="packed").eval()
    rows = sampler.cache_tokens(model)
    assert plan.rows_of(plan.size_of(config, POLICY, 4), 10**9, 1, 2 * 10**7) == rows > 1000
    assert parts["weights"] == plan.scoring(size, 1, 1, 1, 5)["weights"] == 2 * 8_030_261_248
    # bytes a parameter: with 80 GiB 4 for the whole gradient and 12 / 8 for the rest, with 40 GiB 16 / 8
    for memory, states in ((80, 44.17e9), (40, 16.06e9)):
        parts = plan.train_step(size, 8, 2, 200, 900, True, memory * GIB)
        assert parts["weights"] + parts["gradients"] + parts["Adam"] == pytest.approx(states, rel=1e-3)
    assert parts["gathered"] == 2 * 1_050_677_248 + 8 * 218_112_000  # embedding, norm, head; one layer
    without = plan.train_step(size, 8, 2, 200, 900, False, 40 * GIB)["activations"]
    assert without > 7 * parts["activations"] > 7 * 32 * 4000 * 4096 * 2  # the inputs of all layers

def test_hours_are_as_worked_out_by_hand():
    o = mt.Options(recompute=True, rounds=2, update_rm=False, policy_batch=10)
    o.gpus, o.gpu = 8, "h100"
    size = plan.size_of(llama("8B"), POLICY)
    rows = {name: values for name, *values in plan.phases(o, size, size, 5000, 200, 0)}
    assert not any(name.startswith("M") for name in rows)
    times, pairs, tokens, work, hours = rows["E: DPO"]
    assert (times, pairs, tokens) == (4, 1000, 1000 * (200 + 2 * 256))
    # 2 x (forward passes of the reference, of the policy and to recompute, and a backward pass, which is two)
    assert work == pytest.approx(712e3 * 10 * 7.505e9, rel=1e-3)
    assert hours == pytest.approx(5.344e16 / (8 * 0.5 * 989e12) / 3600, rel=1e-3)
    times, samples, tokens, work, hours = rows["E: sample"]
    assert (samples, tokens) == (5000, 5000 * 256)
    # 8 blocks of 125 prompts, one for each GPU. A block takes 625 / 64 x 256 steps, and 768 more until its
    # longest answer is done. A step reads 16.06 GB of weights and the cache of 64 rows of 328 tokens.
    seconds = (2500 + 768) * (16.06e9 + 64 * 328 * 131_072) / (0.5 * 3.35e12)
    assert hours * 3600 == pytest.approx(seconds + 1000 * 1480 * 2 * 7.505e9 / (8 * 0.5 * 989e12), rel=1e-3)
    assert rows["E: select, sample"][0] == 4 * 3  # 100 steps: two checkpoints, and the policy before

# ---------------------------------------------------------------- against the real training step
def trace(config, kind, gpus, pairs, prompt, answer, recompute, memory):
    """(peak bytes of a GPU in the last two micro-batches of a training step, FLOPs of one of them). The code
    is that of dpo.py and reward.py under FSDP2, in a fake group of processes. gpus: 0 stands for a CPU."""
    policy = kind is POLICY
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=max(1, gpus))
    mesh = gpus and init_device_mesh("cpu", (gpus,))  # before FakeTensorMode, since a mesh holds numbers
    with FakeTensorMode():
        config = copy.deepcopy(config)  # from_config would write the dtype into it
        model = kind.from_config(config, dtype=torch.float32, attn_implementation="packed").eval()
        model.plain_head = True  # skips verify, which needs numbers
        root = (ResponseLogps if policy else Rewards)(model)
        training.wrap(root, recompute, mesh, training.BF16)
        optimizer = torch.optim.AdamW(root.parameters(), weight_decay=0.0, fused=True)
        packed = collate([Row([0] * prompt, [[0] * answer] * 2)] * pairs)
        kept = gpus and training.kept_whole(sum(p.numel() for p in root.parameters()), memory, gpus, 2)

        def backward(last):
            if gpus:
                training.before_micro_batch(root, last, *kept)
            chosen, rejected = root(packed).view(-1, 2).T
            losses = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0] if policy \
                else bradley_terry_loss(chosen, rejected)
            losses.mean().backward()
            if last:
                torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)

        with FlopCounterMode(display=False) as flops:
            backward(True)
        optimizer.step()  # not in the tracker: DTensor first tries it on tensors of full shape
        gc.collect()      # frees what the counter still holds
        with FSDPMemTracker(root, optimizer) if gpus else MemTracker() as tracker:
            tracker.track_external(root, optimizer)
            backward(False)
            tracker.reset_mod_stats()
            backward(True)
            optimizer.step()
    dist.destroy_process_group()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], flops.get_total_flops()

@pytest.mark.parametrize("name, layers, kind, gpus, pairs, prompt, answer, recompute, memory", [
    ("8B", 8, POLICY, 64, 2, 200, 900, True, 14),
    ("8B", 3, POLICY, 8, 1, 1000, 1024, False, 17),
    ("70B", 3, RM, 64, 1, 1000, 1024, False, 80),
    ("3B", 6, POLICY, 4, 2, 1000, 1024, True, 80),
    ("3B", 4, RM, 1, 2, 100, 300, True, 30), ("3B", 4, POLICY, 0, 16, 100, 300, False, 30)])
def test_the_formulas_of_training_agree_with_a_traced_step_within_15_percent(
        name, layers, kind, gpus, pairs, prompt, answer, recompute, memory):
    config = llama(name, num_hidden_layers=layers)
    size = plan.size_of(config, kind, 2 if gpus else 4)
    peak, work = trace(config, kind, gpus, pairs, prompt, answer, recompute, memory * GIB)
    formula = sum(plan.train_step(size, gpus or 1, pairs, prompt, answer, recompute, memory * GIB).values())
    assert formula == pytest.approx(peak, rel=0.15)
    tokens = pairs * (prompt + 2 * answer)
    assert (8 if recompute else 6) * size.matrices * tokens == pytest.approx(work, rel=0.25)

# ---------------------------------------------------------------- the command
@pytest.fixture
def planned(call, written, tmp_path, monkeypatch, capsys):
    """planned("8B", "--gpus", 8, …) -> what `python -m evals.plan` prints for folders without weights."""
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**13))
    path = written("prompts.jsonl", [{"prompt": f"write {'a story ' * (i % 90)}{i}"} for i in range(300)])

    def run(name, *words):
        for part, architecture in (("policy", "LlamaForCausalLM"), ("rm", "LlamaForSequenceClassification")):
            llama(name, architectures=[architecture]).save_pretrained(tmp_path / part)
            toy.tokenizer().save_pretrained(tmp_path / part)
        call(plan, "--policy", tmp_path / "policy", "--rm", tmp_path / "rm", "--prompts", path,
             "--out", tmp_path / "out", "--select_prompts", 30, *words)
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out
    return run

def test_8b_fits_on_2_to_16_gpus_and_what_does_not_fit_is_refused_with_what_it_needs(planned, monkeypatch):
    for gpus in (2, 16):
        said = planned("8B", "--gpu", "h100", "--gpus", gpus)
        assert "policy 8.03 B" in said and "300 prompts" in said and "M: Bradley-Terry" in said
    with pytest.raises(Problem, match=r"fit: DPO needs 2 such GPUs; Bradley-Terry needs 2 such GPUs$"):
        planned("8B", "--gpu", "h100", "--gpus", 1)
    more = "needs GPUs with more memory, as each holds a whole model"
    with pytest.raises(Problem, match=f"fit: sampling {more}; scoring {more}$"):
        planned("70B", "--gpu", "h100", "--gpus", 64)
    words = "8B", "--gpu", "h100", "--gpus", 8, "--micro_batch"
    with pytest.raises(Problem, match="fit: DPO needs --micro_batch .*; Bradley-Terry needs") as refusal:
        planned(*words, 100)
    most = int(re.search(r"micro_batch (\d+)", str(refusal.value))[1])
    assert f"--micro_batch {most}, up to {most} fit" in planned(*words, most)
    with pytest.raises(Problem, match=f"fit: DPO needs --micro_batch {most}$"):
        planned(*words, most + 1)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**10))
    with pytest.raises(Problem, match="fit: the disk"):
        planned("8B", "--gpu", "h100", "--gpus", 8)

def test_without_a_gpu_the_plan_is_for_this_cpu_and_short_times_in_minutes(planned, monkeypatch, tmp_path):
    memory, flops, bandwidth, _ = plan.figures_of("cpu")
    assert memory == parallel.memory() / GIB and 1e8 < flops < 1e14 and 1e8 < bandwidth < 1e13
    monkeypatch.setattr(plan, "figures_of", lambda _: (8.0, 50e9, 20e9, (0.8, 0.3)))
    POLICY.from_config(llama("tiny")).save_pretrained(tmp_path / "rm")
    said = planned("tiny", "--select_prompts", 50)
    assert f"--model {tmp_path / 'rm'} --pairs …\nthis CPU, {torch.get_num_threads()} threads; policy" in said
    assert "of 50 GFLOP/s, 20%-50% of 20 GB/s" in said and "--recompute true:" in said and "GPU" not in said
    assert re.search(r"the run: [\d.]+-[\d.]+ min\n\nGiB of this machine, .* Of its 8, 7\.4 are", said)
    with pytest.raises(Problem, match="fit: .*DPO needs more memory; Bradley-Terry needs more memory"):
        planned("3B")  # 12.9 GB of weights in fp32, 51 GB to train
    assert plan.span(0.099, 0.4) == "5.9-24 min" and plan.span(0.1, 3) == "0.10-3.00 h"

def test_too_few_prompts_are_refused_with_sizes_that_fit(planned):
    with pytest.raises(Problem, match=r"2003; --select_prompts 50 fits$"):
        planned("tiny", "--select_prompts", 2000)

def test_prompts_that_the_run_leaves_out_are_left_out_of_the_plan(planned, written):
    rows = [{"prompt": f"sad {i} " + "sad " * (9000 if i < 9 else 9)} for i in range(100)]
    said = planned("8B", "--gpu", "h100", "--prompts", written("long.jsonl", rows))
    assert said.count("9 of 100 prompts are too long") == 1
    assert re.search(r" 91 prompts of \d\d tokens, the longest \d\d$", said, re.M)

def test_a_plan_without_models_or_for_an_unknown_gpu_is_refused_in_one_line(call):
    done = subprocess.run([sys.executable, "-m", "evals.plan"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    message = "a plan needs --policy, --rm, --prompts and a --gpu of a10g, 4090"
    assert f"plan.py: {message}" in done.stderr
    with pytest.raises(Problem, match=message):
        call(plan, *"--policy a --rm b --prompts c --gpu d".split())

"""pytest tests/test_plan.py

The plan's figures are those worked out by hand and those of the training step itself on tensors without
numbers; what does not fit is said before anything starts.
"""
import gc
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from evals.dryrun import trace
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

import mt
import sampler
from common import toy
from common.packing import Row, collate
from common.parallel import Problem
from common.training import BF16, wrap
from dpo import ResponseLogps
from evals import plan
from evals.plan import GIB, POLICY, RM

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


def test_a_tied_head_counts_once_and_multiplies():
    size = plan.size_of(llama("3B"), POLICY)
    assert size.params == size.matrices == 3_212_749_824


def test_memory_is_that_worked_out_by_hand():
    size = plan.size_of(llama("8B"), POLICY)
    parts = plan.sampling(size, 64, 1024, 1024)
    assert parts["cache"] == 64 * 2048 * 131_072  # 32 layers x keys and values x 8 heads x 128 x 2 bytes
    assert plan.rows_of(size, 64, 4000, 80 * GIB) == 64  # 69.8e9 / 2 / 131,072 bytes: 266,000 tokens
    assert plan.rows_of(size, 256, 4000, 80 * GIB) == 66
    assert parts["weights"] == plan.scoring(size, 1, 1, 1, 5)["weights"] == 2 * 8_030_261_248
    parts = plan.train_step(size, 8, 2, 200, 900, True, 80 * GIB)  # the gradient is held: 4 bytes, and 12 / 8
    assert sum(parts[name] for name in ("weights", "gradients", "Adam")) == pytest.approx(44.17e9, rel=1e-3)
    parts = plan.train_step(size, 8, 2, 200, 900, True, 40 * GIB)
    assert sum(parts[name] for name in ("weights", "gradients", "Adam")) == pytest.approx(16.06e9, rel=1e-3)
    assert parts["gathered"] == 2 * 1_050_677_248 + 8 * 218_112_000  # embedding, norm, head; a layer
    without = plan.train_step(size, 8, 2, 200, 900, False, 40 * GIB)["activations"]
    assert without > 7 * parts["activations"] > 7 * 32 * 4000 * 4096 * 2  # the layers' inputs


def test_rows_are_as_many_as_the_sampler_has_room_for(monkeypatch):
    config = llama("tiny")
    model = POLICY.from_config(config, dtype=torch.bfloat16)
    monkeypatch.setattr(sampler, "memory", lambda: 10**7)
    assert plan.rows_of(plan.size_of(config, POLICY), 10**9, 1, 10**7) == sampler.cache_tokens(model) > 1000


def test_hours_are_those_worked_out_by_hand():
    o = mt.Options(recompute=True, rounds=2, update_rm=False, policy_batch=10)
    o.gpus, o.gpu = 8, "h100"
    size = plan.size_of(llama("8B"), POLICY)
    rows = {name: values for name, *values in plan.phases(o, size, size, 5000, 200, 0)}
    assert not any(name.startswith("M") for name in rows)
    times, pairs, tokens, work, hours = rows["E: DPO"]
    assert (times, pairs, tokens) == (4, 1000, 1000 * (200 + 2 * 256))
    assert work == pytest.approx(712e3 * 10 * 7.505e9, rel=1e-3)  # 2 x (reference, forward, again, 2 back)
    assert hours == pytest.approx(5.344e16 / (8 * 0.5 * 989e12) / 3600, rel=1e-3)
    times, samples, tokens, work, hours = rows["E: sample"]
    assert (samples, tokens) == (5000, 5000 * 256)
    # 8 blocks of 125 prompts, one for a GPU, of 625 / 64 x 256 steps and 768 for the longest answer; a step
    # reads 16.06 GB of weights and 64 rows of 328 tokens
    seconds = (2500 + 768) * (16.06e9 + 64 * 328 * 131_072) / (0.5 * 3.35e12)
    assert hours * 3600 == pytest.approx(seconds + 1000 * 1480 * 2 * 7.505e9 / (8 * 0.5 * 989e12), rel=1e-3)
    assert rows["E: select, sample"][0] == 4 * 3  # 100 steps: two checkpoints, and the policy before


# ---------------------------------------------------------------- the real step
@pytest.mark.parametrize("name, layers, kind, gpus, pairs, prompt, answer, recompute, memory", [
    ("8B", 32, POLICY, 64, 2, 200, 900, True, 40),  # the whole of it
    ("8B", 4, RM, 64, 2, 200, 900, True, 40),
    ("8B", 4, RM, 64, 2, 200, 900, True, 6),
    ("8B", 3, POLICY, 8, 1, 1000, 1024, False, 17),
    ("70B", 3, RM, 64, 1, 1000, 1024, False, 80),
    ("3B", 6, POLICY, 4, 2, 1000, 1024, True, 80),
    ("3B", 4, RM, 1, 2, 100, 300, True, 30)])
def test_the_formulas_are_the_traced_step_within_15_percent(name, layers, kind, gpus, pairs, prompt, answer,
                                                            recompute, memory):
    config = llama(name, num_hidden_layers=layers)
    size = plan.size_of(config, kind)
    peak, work = trace(config, kind, gpus, pairs, prompt, answer, recompute, memory * GIB)
    assert config.dtype == torch.bfloat16  # the caller's is left alone
    formula = sum(plan.train_step(size, gpus, pairs, prompt, answer, recompute, memory * GIB).values())
    assert formula == pytest.approx(peak, rel=0.15)
    tokens = pairs * (prompt + 2 * answer)
    assert (8 if recompute else 6) * size.matrices * tokens == pytest.approx(work, rel=0.25)
    if layers == 32:  # by hand: 1.9 GiB of states, gathered 3.6, activations 1.7, the head's gradient 1.0
        assert 7.5 < peak / GIB < 9.5
    if memory == 6:
        assert 4 < peak / GIB < 5.5


def test_sixty_steps_leave_no_more_dtensor_specs_than_five():
    config = llama("tiny")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    try:
        model = POLICY.from_config(config, attn_implementation="sdpa").eval()
        model.set_attn_implementation("packed")
        model.plain_head = True
        root = ResponseLogps(model)
        wrap(root, True, init_device_mesh("cpu", (64,)), BF16)
        optimizer = torch.optim.AdamW(root.parameters(), weight_decay=0.0, fused=True)
        packed, counts = collate([Row([1], [[2, 3], [3]], [0, 0])]), {}
        for step in range(1, 61):
            root(packed).sum().backward()
            torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step in (5, 60):
                gc.collect()
                counts[step] = sum(type(thing) is DTensorSpec for thing in gc.get_objects())
    finally:
        dist.destroy_process_group()
    assert 20 < counts[5] == counts[60]


# ---------------------------------------------------------------- the command
@pytest.fixture
def planned(call, written, tmp_path, monkeypatch, capsys):
    """planned("8B", "--gpus", 8, …) -> what `mt.py --plan` prints about folders without weights."""
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**13))
    path = written("prompts.jsonl", [{"prompt": f"write {'a story ' * (i % 90)}{i}"} for i in range(3000)])

    def run(name, *words):
        for part, architecture in (("policy", "LlamaForCausalLM"), ("rm", "LlamaForSequenceClassification")):
            llama(name, architectures=[architecture]).save_pretrained(tmp_path / part)
            toy.tokenizer().save_pretrained(tmp_path / part)
        call(mt, "--policy", tmp_path / "policy", "--rm", tmp_path / "rm", "--prompts", path,
             "--out", tmp_path / "out", "--plan", *words)
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out
    return run


@pytest.mark.parametrize("gpus", [2, 4, 8, 16])
def test_8b_fits_on_2_to_16_gpus_of_80_gb(planned, gpus):
    said = planned("8B", "--gpu", "h100", "--gpus", gpus)
    assert "policy 8.03 B" in said and "3,000 prompts" in said and "M: Bradley-Terry" in said


def test_8b_on_one_gpu_of_80_gb_is_refused_with_what_it_needs(planned):
    with pytest.raises(Problem, match=r"fit: DPO needs 2 such GPUs; Bradley-Terry needs 2 such GPUs$"):
        planned("8B", "--gpu", "h100", "--gpus", 1)


def test_70b_is_refused_where_a_whole_model_does_not_fit_on_a_gpu(planned):
    more = "needs GPUs with more memory, as each holds a whole model"
    with pytest.raises(Problem, match=f"fit: sampling {more}; scoring {more}$"):
        planned("70B", "--gpu", "h100", "--gpus", 64)
    assert "policy 70.55 B" in planned("70B", "--gpu", "b200", "--gpus", 64, "--sample_batch", 32)


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_one_that_does(planned):
    words = "8B", "--gpu", "h100", "--gpus", 8, "--micro_batch"
    with pytest.raises(Problem, match="fit: DPO needs --micro_batch .*; Bradley-Terry needs") as refusal:
        planned(*words, 100)
    most = int(re.search(r"micro_batch (\d+)", str(refusal.value))[1])
    assert f"--micro_batch {most}, up to {most} fit" in planned(*words, most)
    with pytest.raises(Problem, match=f"fit: DPO needs --micro_batch {most}$"):
        planned(*words, most + 1)


def test_prompts_that_the_run_would_refuse_or_leave_out_are_so_in_the_plan(planned, written):
    rows = [{"prompt": f"sad {i} " + "sad " * (9000 if i < 99 else 9)} for i in range(3000)]
    long = written("long.jsonl", rows)
    words = "8B", "--gpu", "h100", "--prompts", long
    with pytest.raises(Problem, match="long.jsonl:1: .* of 8192 tokens .* leaves out all 99"):
        planned(*words)
    said = planned(*words, "--skip_long")
    assert "99 of 3000 prompts are too long" in said
    assert re.search(r" 2,901 prompts of \d\d tokens, the longest \d\d$", said, re.M)


def test_a_disk_that_is_too_small_is_said(planned, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**10))
    with pytest.raises(Problem, match="fit: the disk"):
        planned("8B", "--gpu", "h100", "--gpus", 8)


def test_exact_traces_both_trainings(planned):
    said = planned("tiny", "exact", "--gpus", 4)
    assert said.count("traced: ") == 2


@pytest.mark.parametrize("words", ["", "--policy a --rm b --prompts c --gpu d"])
def test_a_plan_without_models_or_for_an_unknown_gpu_is_refused(call, words):
    with pytest.raises(Problem, match="--plan needs --policy, --rm, --prompts and a --gpu of a10g, 4090"):
        call(mt, "--plan", *words.split())

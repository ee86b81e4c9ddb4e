"""pytest tests/test_training.py

DPO and Bradley-Terry training give the same numbers however the work is divided, start where they must, and
write folders that transformers can load.
"""
import copy
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import forked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dpo
import reward
from common import models, probe, training
from common.data import load_tokenizer, read_json, read_jsonl
from common.packing import collate, pair_rows
from common.parallel import Problem
from dpo import ResponseLogps
from reward import Rewards

TRAIN = {"dpo": (dpo, ["--beta", 0.1, "--lr", 2e-4]), "reward": (reward, ["--lr", 2e-4])}

@pytest.fixture
def train(call, written, pairs, tmp_path):
    """train(module, model, pairs or their number, "--flag", value, …) -> the folder that is written."""
    def run(module, folder, some, *words, out="out"):
        path = written("pairs.jsonl", pairs[:some] if isinstance(some, int) else some)
        call(module, "--model", folder, "--pairs", path, "--out", tmp_path / out, *words)
        return tmp_path / out
    return run

def metrics(out, key="loss"):
    return [line[key] for line in read_jsonl(out / "metrics.jsonl") if key in line]

# ---------------------------------------------------------------- batches and schedule
def test_shared_work_comes_back_in_order_to_every_process(tmp_path, monkeypatch):
    (tmp_path / "sharing.py").write_text(
        "from common.parallel import rank, share_work, start\nstart()\n"
        "found = share_work(9001, lambda i: (i, rank()), 'numbers')\n"  # exchanged in three pieces
        "assert found == [(i, i % 4096 % 3) for i in range(9001)], rank()\n")
    monkeypatch.syspath_prepend(tmp_path)
    forked("sharing", [], 3)

@pytest.mark.parametrize("rows, batch, micro_batch, world", [
    (97, 8, 2, 1), (97, 8, 2, 2), (97, 8, 3, 4), (5, 8, 1, 3), (1, 4, 2, 2), (33, 16, 16, 3)])
def test_every_row_counts_once_with_shares_that_add_up_to_1_over_all_processes(
        monkeypatch, rows, batch, micro_batch, world):
    lengths = [(7 * i) % 31 + 1 for i in range(rows)]
    monkeypatch.setattr(training, "world", lambda: world)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(training, "rank", lambda rank=rank: rank)
        ranks.append(training.steps_of(lengths, batch, micro_batch, seed=3, epochs=2))
    steps = math.ceil(rows / batch)
    assert [len(mine) for mine in ranks] == [2 * steps] * world
    for step in zip(*ranks):
        assert len({len(micros) for micros in step}) == 1  # collectives need the same number in all processes
        assert all(1 <= len(m.numbers) <= micro_batch for micros in step for m in micros)
        shares = [micro.share for micros in step for micro in micros for _ in micro.numbers]
        assert sum(shares) == pytest.approx(1)
        assert len({share for share in shares if share}) == 1
    for epoch in (slice(steps), slice(steps, None)):
        micros = [micro for mine in ranks for step in mine[epoch] for micro in step]
        seen = [i for micro in micros for i in micro.numbers if micro.share]
        assert sorted(seen) == list(range(rows))
    assert world > 1 or rows < 10 or ranks[0][:steps] != ranks[0][steps:]  # each epoch has its own order

@pytest.mark.parametrize("steps", [1, 7, 20, 100])
def test_the_learning_rate_warms_up_over_a_tenth_and_falls_towards_0(steps):
    factors = [training.cosine(i, steps) for i in range(steps)]
    top = math.ceil(steps / 10) - 1
    assert factors[top] == max(factors) == 1
    assert factors[:top + 1] == pytest.approx([(i + 1) / (top + 1) for i in range(top + 1)])
    falling = factors[top + 1:]
    assert falling == sorted(falling, reverse=True) and all(0 < f <= 1 for f in falling)
    assert not falling or falling[len(falling) // 2] == pytest.approx(0.5, abs=0.1)

# ---------------------------------------------------------------- one process, two, micro-batches
@pytest.mark.parametrize("name", TRAIN)
def test_one_process_two_processes_and_micro_batches_give_the_same_20_steps(
        tiny, script, train, tmp_path, name):
    module, words = TRAIN[name]
    model = tiny(reward=True) if name == "reward" else tiny(tie_word_embeddings=True)
    train(module, model, 97, *words, "--batch", 5, "--micro_batch", 5, out="one")
    train(module, model, 97, *words, "--batch", 5, "--micro_batch", 1, out="micro")
    done = script(f"{name}.py", *words, "--batch", 5, "--micro_batch", 2, "--model", model, "--pairs",
                  tmp_path / "pairs.jsonl", "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"step (\d+)/20", done.stdout) == [str(i) for i in range(1, 21)]  # only rank 0 prints
    losses, norms = (metrics(tmp_path / "one", key) for key in ("loss", "grad_norm"))
    before, weights = (load_file(Path(folder) / "model.safetensors") for folder in (model, tmp_path / "one"))
    assert len(losses) == 20 and losses[0] != losses[-1]
    assert max((weights[name] - before[name]).abs().max() for name in weights) > 1e-3  # the model has changed
    for other in ("one", "micro", "two"):
        assert metrics(tmp_path / other) == pytest.approx(losses, abs=1e-5)
        assert metrics(tmp_path / other, "grad_norm") == pytest.approx(norms, rel=1e-3)
        theirs = load_file(tmp_path / other / "model.safetensors")
        assert theirs.keys() == before.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(theirs[key], weight, rtol=0, atol=1e-4)
        if name == "dpo":
            assert metrics(tmp_path / other)[0] == pytest.approx(math.log(2), abs=1e-6)
            assert metrics(tmp_path / other, "rewards/margins")[0] == 0

@pytest.mark.parametrize("reward_model", [False, True])
def test_recomputing_activations_changes_no_gradient(tiny, pairs, reward_model):
    folder = tiny(reward=reward_model)
    load, wrap = (models.load_reward, Rewards) if reward_model else (models.load_policy, ResponseLogps)
    rows, *_ = pair_rows(load_tokenizer(folder), pairs[:4], 96)
    plain = wrap(load(folder, training=True))
    recomputed = training.shard(copy.deepcopy(plain), recompute=True)
    for model in (plain, recomputed):
        model(collate(rows)).sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)

# ---------------------------------------------------------------- the reference
@pytest.mark.parametrize("kind, dropout", [("llama", "attention_dropout"), ("gpt2", "resid_pdrop")])
def test_the_first_loss_is_ln_2_even_for_a_model_with_dropout(tiny, train, kind, dropout):
    first = read_jsonl(train(dpo, tiny(kind, **{dropout: 0.5}), 8, "--batch", 4) / "metrics.jsonl")[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/margins"], first["rewards/accuracies"]) == (0, 0)

@pytest.mark.parametrize("name", TRAIN)
def test_a_loss_that_is_not_finite_names_its_step(tiny, train, tmp_path, name):
    with pytest.raises(Problem, match="the loss of step 2 is nan"):
        train(TRAIN[name][0], tiny(reward=name == "reward"), 12, "--batch", 4, "--lr", 1e30)
    assert not (tmp_path / "out" / "config.json").exists()

# ---------------------------------------------------------------- what a loss sees
@pytest.mark.parametrize("name", TRAIN)
def test_a_loss_gets_the_pairs_that_its_rows_were_made_of_even_if_others_were_too_long(
        tiny, pairs, train, monkeypatch, name):
    folder, seen = tiny(reward=name == "reward"), {}
    module, function = {"dpo": (dpo, "dpo_loss"), "reward": (reward, "bradley_terry_loss")}[name]
    loss = getattr(module, function)

    def replaced(*arguments):
        for chosen, pair in zip(arguments[0].tolist(), arguments[-1], strict=True):
            seen.setdefault(pair["number"], chosen)
        return loss(*arguments)
    monkeypatch.setattr(module, function, replaced)
    numbered = [pair | {"number": i} for i, pair in enumerate(pairs[:16])]
    train(module, folder, numbered, "--lr", 1e-9, "--batch", 4, "--micro_batch", 3, "--max_length", 36)
    assert 0 < len(seen) < 16
    wrap, load = (ResponseLogps, models.load_policy) if name == "dpo" else (Rewards, models.load_reward)
    model = wrap(load(folder))
    for number, chosen in seen.items():
        [row], _ = pair_rows(load_tokenizer(folder), [pairs[number]], 96, policy=name == "dpo")
        assert chosen == pytest.approx(model(collate([row]))[0].item(), rel=1e-4, abs=1e-4)

@pytest.mark.parametrize("name", TRAIN)
def test_the_weight_of_a_pair_multiplies_its_loss(tiny, pairs, train, name):
    folder, losses, weights = tiny(reward=name == "reward"), {}, {}
    for weight in ({}, {"weight": 1.0}, {"weight": 0.0}, {"weight": 2.0}):
        out = train(TRAIN[name][0], folder, [pair | weight for pair in pairs[:8]], "--batch", 4, "--lr", 1e-3,
                    out=f"out{weight.get('weight')}")
        losses[weight.get("weight")] = metrics(out)
        weights[weight.get("weight")] = load_file(out / "model.safetensors")
    assert losses[1] == losses[None] and losses[0] == [0, 0]
    assert losses[2][0] == pytest.approx(2 * losses[1][0])
    before = load_file(Path(folder) / "model.safetensors")
    for other, same in ((weights[1], weights[None]), (weights[0], before)):
        assert all(other[key].equal(weight) for key, weight in same.items())

def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pairs):
    """IPO (arXiv 2310.12036): its first loss is (1 / 2β)², 25 for β = 0.1."""
    rewards = beta * (chosen_logps - ref_chosen_logps), beta * (rejected_logps - ref_rejected_logps)
    return ((rewards[0] - rewards[1]) / beta - 1 / (2 * beta))**2, rewards[0].detach(), rewards[1].detach()

@pytest.mark.parametrize("loss, first", [(dpo.dpo_loss, "0.6931"), (ipo_loss, "25.0")])
def test_a_policy_that_differs_from_its_own_reference_is_refused_whatever_the_loss(
        tiny, train, tmp_path, monkeypatch, loss, first):
    def load_with_dropout(*inputs, **settings):
        model = load_policy(*inputs, **settings)
        probe.verify(model)  # at a model's first use; with dropout it would refuse the model
        return model.train()
    load_policy = models.load_policy
    monkeypatch.setattr(dpo, "dpo_loss", loss)
    assert metrics(train(dpo, tiny(), 8, "--beta", 0.1))[0] == pytest.approx(float(first), abs=1e-4)
    monkeypatch.setattr(models, "load_policy", load_with_dropout)
    with pytest.raises(Problem, match=f"loss of step 1 is .* not {first}"):
        train(dpo, tiny("gpt2"), 8, "--beta", 0.1, out="refused")
    assert not (tmp_path / "refused" / "config.json").exists()

# ---------------------------------------------------------------- what is written
@pytest.mark.parametrize("kind, tied", [("llama", True), ("llama", False), ("gpt2", True), ("qwen2", True)])
def test_a_trained_policy_is_a_folder_that_from_pretrained_can_load(tiny, train, kind, tied):
    source = tiny(kind, tie_word_embeddings=tied)
    out = train(dpo, source, 8, "--lr", 1e-3)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (not tied)  # tied: saved once
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7]
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source)
    assert ours.chat_template == theirs.chat_template and ours("a sad poem") == theirs("a sad poem")
    assert read_json(out / "config.json") == read_json(Path(source) / "config.json")
    assert {path.name for path in out.iterdir()} - {path.name for path in Path(source).iterdir()} == {
        "metrics.jsonl", "run.json"}

def test_metrics_have_trls_names_and_pairs_that_are_too_long_are_counted(tiny, train):
    begin, step = read_jsonl(train(dpo, tiny(), 12, "--max_length", 38) / "metrics.jsonl")
    assert {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
            "logps/chosen", "logps/rejected", "learning_rate", "grad_norm"} <= step.keys()
    assert begin["pairs"] == step["batch"] == 12 - begin["pairs_dropped"] and begin["pairs_dropped"] > 0
    assert {"chosen_tokens", "rejected_tokens"} <= begin.keys()

# ---------------------------------------------------------------- the same command again
@pytest.mark.parametrize("name", TRAIN)
def test_a_finished_folder_is_left_alone(tiny, train, name):
    folder = tiny(reward=name == "reward")
    out = train(TRAIN[name][0], folder, 8)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "run.json"}
    train(TRAIN[name][0], folder, 8)
    assert {path: path.stat().st_mtime_ns for path in before} == before

"""pytest tests/test_training.py

DPO and Bradley-Terry training: the same numbers however the work is cut up, and folders that anyone can load.
"""
import contextlib
import copy
import ctypes
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import dpo
import mt
import reward
from common import models, packing, parallel, run, training
from common.data import load_tokenizer, read_jsonl
from common.packing import collate, pair_rows
from common.parallel import Problem
from dpo import ResponseLogps
from reward import Rewards

ROOT = Path(__file__).parents[1]


def metrics(out, key="loss"):
    return [line[key] for line in read_jsonl(out / "metrics.jsonl") if key in line]


# ---------------------------------------------------------------- batches and schedule
def test_dealt_work_comes_back_in_order_from_every_process(tmp_path):
    path = tmp_path / "deal.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom parallel import *\nstart()\n"
                    "found = dealt(9001, lambda i: (i, rank()), 'numbers')\n"  # exchanged three times
                    "assert found == [(i, i % 4096 % 3) for i in range(9001)], rank()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run([*torchrun, path], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's")
def test_freed_memory_is_kept_on_a_cpu():
    code = ("import parallel, torch; parallel.start()\ntensors = [torch.ones(5 * 2**20) for _ in range(8)]\n"
            "def held(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])\n"
            "before = held(); del tensors; print((before - held()) // 1024)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert int(done.stdout) < 20  # MB given back to the system, of 160


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
        assert len({len(micros) for micros in step}) == 1  # collectives need the same number everywhere
        assert all(len(m.numbers) == len(m.shares) <= micro_batch for micros in step for m in micros)
        shares = [share for micros in step for micro in micros for share in micro.shares]
        assert sum(shares) == pytest.approx(1)
        assert len({share for share in shares if share}) == 1
    for epoch in (slice(steps), slice(steps, None)):
        micros = [micro for mine in ranks for step in mine[epoch] for micro in step]
        seen = [i for micro in micros for i, share in zip(micro.numbers, micro.shares) if share]
        assert sorted(seen) == list(range(rows))
    assert world > 1 or rows < 10 or ranks[0][:steps] != ranks[0][steps:]  # shuffled anew


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
TRAIN = {"dpo": (dpo, ["--beta", 0.1, "--lr", 2e-4]), "reward": (reward, ["--lr", 2e-4])}


@pytest.mark.parametrize("name", TRAIN)
def test_one_process_two_processes_and_micro_batches_give_the_same_20_steps(
        tiny, call, script, written, pairs, tmp_path, name):
    module, (*words,) = TRAIN[name]
    model, path = tiny(reward=name == "reward"), written("pairs.jsonl", pairs)
    words += ["--model", model, "--pairs", path, "--batch", 5]
    call(module, *words, "--micro_batch", 5, "--out", tmp_path / "one")
    call(module, *words, "--micro_batch", 1, "--out", tmp_path / "micro")
    done = script(f"{name}.py", *words, "--micro_batch", 2, "--out", tmp_path / "two", "--log_every", 9,
                  processes=2)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"step (\d+)/20", done.stdout) == ["9", "18"]  # only rank 0 speaks
    losses, norms = (metrics(tmp_path / "one", key) for key in ("loss", "grad_norm"))
    weights = load_file(tmp_path / "one" / "model.safetensors")
    assert len(losses) == 20 and losses[0] != losses[-1]
    before = load_file(Path(model) / "model.safetensors")
    assert max((weights[name] - before[name]).abs().max() for name in weights) > 1e-3  # something was learnt
    for other in ("micro", "two"):
        assert metrics(tmp_path / other) == pytest.approx(losses, abs=1e-5)
        assert metrics(tmp_path / other, "grad_norm") == pytest.approx(norms, rel=1e-3)
        theirs = load_file(tmp_path / other / "model.safetensors")
        assert theirs.keys() == weights.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(theirs[key], weight, rtol=0, atol=1e-4)
    if name == "dpo":
        for out in ("one", "micro", "two"):
            assert metrics(tmp_path / out)[0] == pytest.approx(math.log(2), abs=1e-6)
            assert metrics(tmp_path / out, "rewards/margins")[0] == 0


def test_steps_are_a_bar_on_a_terminal_and_nothing_in_a_redirected_log(tiny, written, pairs, tmp_path):
    command = [sys.executable, ROOT / "dpo.py", "--model", tiny(), "--batch", "5", "--pairs",
               written("pairs.jsonl", pairs[:20]), "--out"]
    done = subprocess.run([*command, tmp_path / "redirected"], capture_output=True, text=True, check=True)
    assert done.stderr == "" and "step 4/4" not in done.stdout
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 200))
    process, said = subprocess.Popen([*command, tmp_path / "shown"], stderr=theirs), ""
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # the end of a terminal
        while True:
            said += terminal.read(4096).decode(errors="replace")
    assert process.wait() == 0
    assert re.search(r"steps: 100%.*4/4 .*loss 0.*margins .*grad_norm .*lr ", said), said


def test_tensorboard_gets_the_numbers_of_the_metrics_under_their_names(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = run.open_log(tmp_path / "metrics.jsonl", "round1/m/rm", report_to="tensorboard")
    for step in (1, 2):
        log(step=step, **{"rewards/margins": step / 4}, text="not a number")
    found = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["round1/m/rm/step", "round1/m/rm/rewards/margins"]
    assert [(x.step, x.value) for x in found.Scalars("round1/m/rm/rewards/margins")] == [(1, 0.25), (2, 0.5)]


def test_wandb_gets_the_numbers_of_the_metrics_under_their_names(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = run.open_log(tmp_path / "metrics.jsonl", "round1/m/rm", report_to="wandb")
    log(step=7, **{"rewards/margins": 0.25}, text="not a number")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert {k: v for k, v in summary.items() if k[0] != "_"} == {
        "round1/m/rm/step": 7, "round1/m/rm/rewards/margins": 0.25}


def test_tied_models_train_alike_in_two_processes(tiny, call, script, written, pairs, tmp_path):
    folder = tiny(tie_word_embeddings=True)
    words = ["--model", folder, "--pairs", written("pairs.jsonl", pairs[:12]), "--batch", 4, "--lr", 1e-3]
    call(dpo, *words, "--out", tmp_path / "one")
    done = script("dpo.py", *words, "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys() == load_file(Path(folder) / "model.safetensors").keys()
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("reward_model", [False, True])
def test_recomputing_activations_changes_no_gradient(tiny, pairs, reward_model):
    folder = tiny(reward=reward_model)
    load, wrap = (models.load_reward, Rewards) if reward_model else (models.load_policy, ResponseLogps)
    rows, *_ = pair_rows(load_tokenizer(folder), pairs[:4], 96)
    plain = wrap(load(folder, training=True))
    recomputed = parallel.shard(copy.deepcopy(plain), recompute=True)
    for model in (plain, recomputed):
        model(collate(rows)).sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the reference
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_loss_is_ln_2_even_for_a_model_with_dropout(tiny, call, written, pairs, tmp_path, kind):
    dropout = {"resid_pdrop": 0.5} if kind == "gpt2" else {"attention_dropout": 0.5}
    path, out = written("pairs.jsonl", pairs[:8]), tmp_path / "out"
    call(dpo, "--model", tiny(kind, **dropout), "--pairs", path, "--out", out, "--batch", 4)
    first = read_jsonl(out / "metrics.jsonl")[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/margins"], first["rewards/accuracies"]) == (0, 0)


def with_dropout(monkeypatch):
    """Policies are loaded with a dropout that comes after the probe, which would have seen it."""
    def load(*inputs, **settings):
        model = load_policy(*inputs, **settings)
        packing.verify(model)
        return model.train()
    load_policy = models.load_policy
    monkeypatch.setattr(models, "load_policy", load)


def test_a_policy_that_differs_from_its_own_reference_is_refused(
        tiny, call, written, pairs, tmp_path, monkeypatch):
    with_dropout(monkeypatch)
    with pytest.raises(Problem, match="loss of step 1 is .* not 0.6931"):
        call(dpo, "--model", tiny("gpt2"), "--pairs", written("pairs.jsonl", pairs[:8]), "--beta", 1,
             "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", TRAIN)
def test_a_loss_that_is_not_finite_names_its_step(tiny, call, written, pairs, tmp_path, name):
    model, path = tiny(reward=name == "reward"), written("pairs.jsonl", pairs[:12])
    with pytest.raises(Problem, match="the loss of step 2 is nan"):
        call(TRAIN[name][0], "--model", model, "--pairs", path, "--out", tmp_path / "out", "--batch", 4,
             "--lr", 1e30)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", TRAIN)
def test_over_long_pairs_are_counted_and_if_all_are_that_is_a_problem(
        tiny, call, written, pairs, tmp_path, name):
    words = ["--model", tiny(reward=name == "reward"), "--pairs", written("pairs.jsonl", pairs[:12])]
    with pytest.raises(Problem, match="none of 12 pairs is short enough for --max_length 5"):
        call(TRAIN[name][0], *words, "--max_length", 5, "--out", tmp_path / "none")
    call(TRAIN[name][0], *words, "--max_length", 38, "--out", tmp_path / "some")
    [kept], [dropped] = metrics(tmp_path / "some", "pairs"), metrics(tmp_path / "some", "pairs_dropped")
    assert kept + dropped == 12 and kept > 0 and dropped > 0


# ---------------------------------------------------------------- what a loss sees
def trained(name, folder, pairs, **more):
    """(metrics of each step, the model after it) of a training of pairs by `name`.train."""
    settings = dict(lr=1e-3, batch=4, micro_batch=3, max_length=40) | more
    lines = []

    def log(shown="", step=None, **values):
        lines.extend([values] if step else [])
    if name == "dpo":
        *_, (_, _, model) = dpo.train(folder, pairs, beta=0.1, log=log, **settings)
    else:
        model = reward.train(folder, pairs, log=log, **settings)
    return lines, model


@pytest.mark.parametrize("name", TRAIN)
def test_a_loss_gets_the_pairs_of_its_rows_though_some_were_too_long(tiny, pairs, monkeypatch, name):
    folder, seen = tiny(reward=name == "reward"), {}
    module, function = {"dpo": (dpo, "dpo_loss"), "reward": (reward, "bradley_terry_loss")}[name]
    loss = getattr(module, function)

    def replaced(*arguments):
        for chosen, pair in zip(arguments[0].tolist(), arguments[-1], strict=True):
            seen.setdefault(pair["number"], chosen)
        return loss(*arguments)
    monkeypatch.setattr(module, function, replaced)
    numbered = [pair | {"number": i} for i, pair in enumerate(pairs[:16])]
    trained(name, folder, numbered, lr=1e-9)
    assert 0 < len(seen) < 16
    wrap, load = (ResponseLogps, models.load_policy) if name == "dpo" else (Rewards, models.load_reward)
    model, unfinished = wrap(load(folder)), name == "dpo"
    for number, chosen in seen.items():
        [row], _ = pair_rows(load_tokenizer(folder), [pairs[number]], 96, unfinished)
        assert chosen == pytest.approx(model(collate([row]))[0].item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", TRAIN)
def test_a_pair_counts_as_much_as_its_weight(tiny, pairs, name):
    folder = tiny(reward=name == "reward")
    every, none, twice = ([pair | {"weight": weight} for pair in pairs[:8]] for weight in (1.0, 0.0, 2.0))
    (first, *_), model = trained(name, folder, pairs[:8])
    (same, *_), equal = trained(name, folder, every)
    assert same == first and all(a.equal(b) for a, b in zip(model.parameters(), equal.parameters()))
    (double, *_), _ = trained(name, folder, twice)
    assert double["loss"] == pytest.approx(2 * first["loss"])
    (nothing, *_), untouched = trained(name, folder, none)
    assert nothing["loss"] == nothing["grad_norm"] == 0
    before = load_file(Path(folder) / "model.safetensors")
    assert all(weight.equal(before[key.removeprefix("model.")])
               for key, weight in untouched.state_dict().items() if key.removeprefix("model.") in before)


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pairs):
    """IPO (arXiv 2310.12036): its first loss is (1 / 2β)², 25 for β = 0.1."""
    rewards = beta * (chosen_logps - ref_chosen_logps), beta * (rejected_logps - ref_rejected_logps)
    return ((rewards[0] - rewards[1]) / beta - 1 / (2 * beta))**2, rewards[0].detach(), rewards[1].detach()


def test_the_first_loss_is_held_to_the_references_whatever_the_loss(tiny, pairs, monkeypatch):
    monkeypatch.setattr(dpo, "dpo_loss", ipo_loss)
    lines, _ = trained("dpo", tiny(), pairs[:8])
    assert lines[0]["loss"] == pytest.approx(25)
    with_dropout(monkeypatch)
    with pytest.raises(Problem, match="loss of step 1 is .* not 25.0"):
        trained("dpo", tiny("gpt2"), pairs[:8])


# ---------------------------------------------------------------- what is written
@pytest.mark.parametrize("kind, tied", [("llama", True), ("llama", False), ("gpt2", True), ("qwen2", True)])
def test_a_trained_policy_is_a_folder_that_from_pretrained_loads(
        tiny, call, written, pairs, tmp_path, kind, tied):
    source, out = tiny(kind, tie_word_embeddings=tied), tmp_path / "out"
    call(dpo, "--model", source, "--pairs", written("pairs.jsonl", pairs[:8]), "--out", out, "--lr", 1e-3)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (not tied)  # once
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7]
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source)
    assert ours.chat_template == theirs.chat_template and ours("a sad poem") == theirs("a sad poem")
    configs = [json.loads((Path(folder) / "config.json").read_text()) for folder in (out, source)]
    assert configs[0] == configs[1]
    assert {path.name for path in out.iterdir()} - {path.name for path in Path(source).iterdir()} == {
        "metrics.jsonl", "run.json"}
    ids = torch.tensor([[1, 5, 6, 7]])
    assert not torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(source)(ids).logits)


def test_a_trained_reward_model_is_a_folder_that_from_pretrained_loads(tiny, call, written, pairs, tmp_path):
    out = tmp_path / "out"
    call(reward, "--model", tiny(reward=True), "--pairs", written("pairs.jsonl", pairs[:8]), "--out", out)
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_labels == 1 and model.score.weight.shape == (1, 32)
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_a_model_keeps_the_precision_that_it_was_stored_in(tiny, call, written, pairs, tmp_path):
    folder = Path(shutil.copytree(tiny(), tmp_path / "bf16"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    call(dpo, "--model", folder, "--pairs", written("pairs.jsonl", pairs[:8]), "--out", tmp_path / "out")
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("select, save_every, names", [
    (True, 3, ["step-3", "step-6", "step-7"]), (True, 7, ["step-7"]), (False, 3, ["step-7"])])
def test_checkpoints_are_saved_every_so_many_steps_and_at_the_end(
        tiny, pairs, written, tmp_path, select, save_every, names):
    o = mt.Options(out=tmp_path, beta=0.1, policy_lr=1e-3, policy_batch=4, micro_batch=4, max_length=96,
                   select=select, save_every=save_every)
    manifest.claim(o.out, o)
    made = mt.train_policy(o, tiny(), written("pairs.jsonl", pairs[:27]), tmp_path / "round1" / "checkpoints")
    assert [path.name for path in made] == names
    for path in made:
        AutoModelForCausalLM.from_pretrained(path)


def test_metrics_have_the_names_of_trl(tiny, call, written, pairs, tmp_path):
    call(dpo, "--model", tiny(), "--pairs", written("pairs.jsonl", pairs[:8]), "--out", tmp_path / "out")
    expected = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
                "logps/chosen", "logps/rejected", "learning_rate", "grad_norm"}
    assert expected <= read_jsonl(tmp_path / "out" / "metrics.jsonl")[1].keys()
    assert {"chosen_tokens", "rejected_tokens"} <= read_jsonl(tmp_path / "out" / "metrics.jsonl")[0].keys()


# ---------------------------------------------------------------- the same command again
def test_a_finished_folder_is_left_alone_and_another_setting_is_refused(tiny, call, written, pairs, tmp_path):
    words = ["--model", tiny(), "--pairs", written("pairs.jsonl", pairs[:8]), "--out", tmp_path / "out"]
    call(dpo, *words)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    call(dpo, *words)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    differences = "beta: 0.01 there, 0.5 now; lr: 7e-07 there, 0.1 now"
    with pytest.raises(Problem, match=f"belongs to another run; .*{differences}"):
        call(dpo, *words, "--beta", 0.5, "--lr", 0.1)


def test_a_folder_with_other_things_in_it_is_refused(tiny, call, written, pairs, tmp_path):
    written("out/notes.jsonl", [{}])
    with pytest.raises(Problem, match="exists and was not written by this command"):
        call(dpo, "--model", tiny(), "--pairs", written("pairs.jsonl", pairs[:8]), "--out", tmp_path / "out")


# ---------------------------------------------------------------- going on within an epoch
class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", TRAIN)
@pytest.mark.parametrize("kills", [[4], [9], [10, 15]])
def test_a_training_that_was_killed_goes_on_to_the_same_bytes(
        tiny, call, written, pairs, tmp_path, monkeypatch, name, kills):
    module, words = TRAIN[name]
    words = [*words, "--model", tiny(reward=name == "reward"), "--pairs", written("pairs.jsonl", pairs),
             "--batch", 5, "--resume_every", 4]
    call(module, *words, "--out", tmp_path / "undisturbed")
    cosine, taken = training.cosine, []
    for last in kills:
        def dies(step, steps, last=last):
            if step == last - 1:
                raise Killed
            return cosine(step, steps)
        monkeypatch.setattr(training, "cosine", dies)
        with pytest.raises(Killed):
            call(module, *words, "--out", tmp_path / "killed")
    monkeypatch.setattr(training, "cosine", lambda step, steps: taken.append(step) or cosine(step, steps))
    call(module, *words, "--out", tmp_path / "killed")
    kept = (max(kills) - 1) // 4 * 4
    assert taken == list(range(kept, 20))  # only what was not kept is done again
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()
                     if path.name != "run.json"} for out in ("killed", "undisturbed"))
    assert ours == theirs
    assert not list(tmp_path.glob(".*.resume"))

"""pytest tests/test_variants_reward.py

The variants of the M-step and of the reward model: each loss and each choice against numbers worked out by
hand, each command on a tiny task, and two processes give what one gives.
"""
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mt
import reward
from common import models, training
from common.data import encode_chat, load_tokenizer, read_json, read_jsonl, write_jsonl
from common.parallel import Problem
from variants import bsr, ensemble, ocrm, rrm, seam, warm

TRAIN = dict(lr=1e-3, batch=8, micro_batch=4, max_length=64)


def preferences(out):
    return read_jsonl(out / "round1" / "m" / "preferences.jsonl")


def rm_losses(out, phase="round1/m/rm"):
    rows = read_jsonl(out / "metrics.jsonl")
    return [row["loss"] for row in rows if row["phase"] == phase and "loss" in row]


def same(one, two):
    """That two runs trained their RMs on the same rows, with the same losses up to rounding."""
    for key in ("prompt", "chosen", "rejected"):
        assert [row[key] for row in preferences(one)] == [row[key] for row in preferences(two)]
    losses = rm_losses(one)
    assert losses and losses == pytest.approx(rm_losses(two), abs=1e-5)


# ---------------------------------------------------------------- WARM
def test_warm_averages_the_weights_of_models_by_different_orders(tiny, pairs):
    def weights(train, **settings):
        lines = []
        model = train(tiny(reward=True), pairs[:20], log=lambda shown="", **row: lines.append((shown, row)),
                      **TRAIN, **settings)
        return torch.cat([weight.detach().flatten() for weight in model.parameters()]), lines

    alone = [weights(warm.train, seed=seed)[0] for seed in (5, 6, 7)]
    averaged, lines = weights(warm.train_averaged, seed=5)
    assert torch.allclose(averaged, torch.stack(alone).mean(0), atol=1e-6)
    assert not torch.allclose(alone[0], alone[1], atol=1e-4)  # the orders matter
    assert Counter(row["member"] for _, row in lines) == {0: 4, 1: 4, 2: 4}  # three steps and a head, each
    assert lines[-1][0].startswith("member 2  step 3/3")


def test_warm_runs_and_two_processes_give_its_losses(variant):
    one, two = (variant("warm", processes=processes) for processes in (1, 2))
    same(one, two)
    members = Counter(row["member"] for row in read_jsonl(one / "metrics.jsonl") if "accuracy" in row)
    assert list(members) == [0, 1, 2] and len(set(members.values())) == 1


# ---------------------------------------------------------------- an ensemble
def test_an_ensemble_takes_off_deviation_or_takes_the_lowest(monkeypatch):
    rewards = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, -1.0]])  # of two members
    assert ensemble.combine(rewards).tolist() == [2 - 1, 0, 0.5 - 1.5]
    monkeypatch.setattr(ensemble, "LAMBDA", None)
    assert ensemble.combine(rewards).tolist() == [1, 0, -1]


def test_an_ensemble_judges_by_all_its_members_from_a_zero_each(tiny, prompts, tmp_path):
    for k, name in enumerate(("rm", "rm1")):
        (tmp_path / name).symlink_to(tiny(reward=True, seed=k))
    rows = [dict(prompt=prompt, response=answer) for prompt in prompts[:3]
            for answer in ("the end .", "waves")]
    ensemble.judge(str(tmp_path / "rm"), rows, tmp_path / "scored.jsonl", 2)
    alone = []
    for name in ("rm", "rm1"):
        reward.score(str(tmp_path / name), rows, tmp_path / f"alone-{name}.jsonl", 2)
        alone.append([row["score"] for row in read_jsonl(tmp_path / f"alone-{name}.jsonl")])
    zeros = np.mean(alone, axis=1)
    assert read_json(tmp_path / "zeros.json")["zeros"] == pytest.approx(zeros.tolist())
    (a, b), scored = np.array(alone) - zeros[:, None], read_jsonl(tmp_path / "scored.jsonl")
    assert [row["score"] for row in scored] == pytest.approx((a + b) / 2 - abs(a - b) / 2)
    assert scored[1]["members"] == pytest.approx([a[1], b[1]])
    ensemble.judge(str(tmp_path / "rm"), rows[:2], tmp_path / "again.jsonl", 2)  # the zeros stay
    assert [row["score"] for row in read_jsonl(tmp_path / "again.jsonl")] == pytest.approx(
        [row["score"] for row in scored[:2]])


def test_an_ensemble_runs_and_two_processes_give_its_losses(variant, tiny):
    others = ["--others", tiny(reward=True, seed=1)]
    one, two = (variant("ensemble", *others, processes=processes) for processes in (1, 2))
    same(one, two)
    assert rm_losses(one, "round1/m/rm1") == pytest.approx(rm_losses(two, "round1/m/rm1"), abs=1e-5)
    judged = [file for name in ("e?/samples", "e?/select/*", "m/new", "m/old")
              for file in (one / "round1").glob(f"{name}.jsonl")]
    assert len(judged) >= 8 and all(len(row["members"]) == 2 for file in judged for row in read_jsonl(file))
    a, b, start = (load_file(f"{folder}/model.safetensors")["score.weight"] for folder in (
        one / "round1/m/rm", one / "round1/m/rm1", others[1]))
    assert (b - start).abs().max() < 0.02 < (a - start).abs().max()  # each from a base of its own


def test_an_ensemble_of_one_is_refused(tiny, tmp_path):
    with pytest.raises(Problem, match="--others"):
        ensemble.make_base(ensemble.Options(rm=tiny(reward=True), out=str(tmp_path)))


def test_the_embedded_tasks_members_learn_its_labels_by_seeds_of_their_own(
        tiny, pairs, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    for name, folder in (("policy", tiny()), ("rm", tiny(reward=True))):
        (tmp_path / "base" / name).symlink_to(folder)
    write_jsonl(tmp_path / "base" / "preferences.jsonl", pairs[:20])
    monkeypatch.setattr(ensemble.toy, "RM", dict(lr=1e-3, batch=8, micro_batch=4, epochs=1))
    monkeypatch.setattr(models, "local_folder", str)
    policy, rm = (str(tmp_path / "base" / name) for name in ("policy", "rm"))
    o = ensemble.Options(policy=policy, rm=rm, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    ensemble.manifest.claim(o.out, o)
    rms = ensemble.members(ensemble.make_base(o))
    assert [Path(rm).name for rm in rms] == ["rm", "rm1", "rm2"]
    assert Path(rms[0]).resolve() == Path(tiny(reward=True)).resolve()
    for k in (1, 2):
        model = reward.train(o.policy, pairs[:20], seed=k, fresh_head=True, lr=1e-3, batch=8, micro_batch=4,
                             max_length=o.max_length, log=lambda *_, **__: None).model
        assert torch.equal(load_file(f"{rms[k]}/model.safetensors")["score.weight"], model.score.weight)


# ---------------------------------------------------------------- BSR
def test_bsr_adds_the_square_of_the_batchs_mean_reward_in_value_and_in_gradient():
    rewards = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 1.0]], requires_grad=True)  # m = 2, B = 3
    plain = reward.bradley_terry_loss(*rewards.T)
    losses = bsr.bsr_losses(plain, rewards.mean(1), total=6.0, count=3)
    assert losses.mean().item() == pytest.approx(plain.mean().item() + 1e-3 * 3 * 2**2, rel=1e-6)
    ours, = torch.autograd.grad(losses.mean(), rewards, retain_graph=True)
    expected, = torch.autograd.grad(plain.mean() + 1e-3 * 3 * rewards.mean()**2, rewards)
    assert torch.allclose(ours, expected, atol=1e-7)


def test_bsr_does_not_depend_on_the_micro_batch(tiny, pairs, monkeypatch):
    monkeypatch.setattr(bsr, "LAMBDA", 1.0)  # as large as the loss
    monkeypatch.setattr(training, "optimise", bsr.optimise_with_bsr)

    def losses(micro_batch, rows=pairs[:20]):  # batches of 8, 8 and 4
        lines = []
        reward.train(tiny(reward=True), rows, log=lambda shown="", **row: lines.append(row),
                     **TRAIN | {"micro_batch": micro_batch})
        return [row for row in lines if "loss" in row]

    whole, parts = losses(8), losses(3)
    assert [row["loss"] for row in whole] == pytest.approx([row["loss"] for row in parts], abs=1e-5)
    assert [row["grad_norm"] for row in whole] == pytest.approx([row["grad_norm"] for row in parts], rel=1e-3)
    monkeypatch.setattr(bsr, "LAMBDA", 0.0)
    plain = losses(8)[0]
    assert whole[0]["loss"] == pytest.approx(plain["loss"] + 8 * plain["mean_reward"]**2, rel=1e-5)
    assert abs(whole[0]["loss"] - plain["loss"]) > 0.1


def test_bsr_runs_and_two_processes_give_its_losses(variant):
    one, two = (variant("bsr", processes=processes) for processes in (1, 2))
    same(one, two)
    rows = [row for row in read_jsonl(one / "metrics.jsonl") if "bsr" in row]
    assert len(rows) == len(rm_losses(one))
    assert rows[0]["bsr"] == pytest.approx(1e-3 * 8 * rows[0]["mean_reward"]**2, rel=1e-4)  # 8 pairs


# ---------------------------------------------------------------- RRM
def test_rrm_takes_a_tie_as_half_of_either_order():
    losses = rrm.rrm_loss(torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5]), [{}, {"tie": True}])
    first, second = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert losses.tolist() == pytest.approx([first, (first + second) / 2], rel=1e-6)


def test_rrm_pairs_own_with_foreign_and_foreign_with_foreign():
    rows = [dict(prompt=f"p{i}", chosen=f"good{i}", rejected=f"bad{i}", source=f"s{i}",
                 chosen_policy=f"new{i}", rejected_policy=f"old{i}") for i in range(40)]
    made = list(rrm.foreign_pairs(rows, np.random.default_rng(0)))
    kinds = set()
    for wins, tie in zip(made[::2], made[1::2], strict=True):
        i, j = wins["prompt"][1:], wins["foreign"][1:]
        assert i != j and (tie["prompt"], tie["foreign"]) == (f"p{i}", f"p{j}")
        assert wins["chosen"] in (f"good{i}", f"bad{i}") and wins["rejected"] in (f"good{j}", f"bad{j}")
        assert (tie["chosen"], tie["rejected"]) == (f"good{j}", f"bad{j}")
        assert tie["tie"] and "tie" not in wins
        for row, owner in ((wins, i), (tie, j)):
            assert row["chosen_policy"] == ("new" if row["chosen"].startswith("good") else "old") + owner
        assert wins["rejected_policy"] == ("new" if wins["rejected"].startswith("good") else "old") + j
        kinds.add((wins["chosen"][0], wins["rejected"][0]))
    assert len(kinds) == 4 and len(made) > 70  # a permutation leaves few in their place


def test_rrm_runs_and_two_processes_give_its_losses(variant):
    one, two = (variant("rrm", processes=processes) for processes in (1, 2))
    same(one, two)
    rows = preferences(one)
    assert [row for row in rows if "foreign" not in row] == read_jsonl(one / "round1" / "m" / "own.jsonl")
    assert sum("tie" in row for row in rows) == sum("foreign" in row for row in rows) / 2 > 0


# ---------------------------------------------------------------- labelled pairs
@pytest.fixture
def anchor(written, pairs):
    return ["--anchor", written("labels.jsonl", pairs[:40])]


def test_anchored_mixes_in_as_many_labelled_pairs(variant, anchor, pairs):
    one, two = (variant("anchored", *anchor, processes=processes) for processes in (1, 2))
    same(one, two)
    rows = preferences(one)
    labelled = [row for row in rows if row["source"] == str(anchor[1])]
    assert 2 * len(labelled) == len(rows) > 8
    answers = {pair["prompt"]: (pair["chosen"], pair["rejected"]) for pair in pairs[:40]}
    assert all((row["chosen"], row["rejected"]) == answers[row["prompt"]] for row in labelled)
    assert len({row["prompt"] for row in labelled}) == len(labelled)


def test_labels_that_are_missing_are_asked_for_at_once(variant, tmp_path):
    with pytest.raises(AssertionError, match="--anchor FILE names the labelled pairs"):
        variant("ocrm")  # whose check is that of anchored
    assert not (tmp_path / "ocrm1" / "prompts").exists()


def test_ocrm_weighs_pairs_by_a_ratio_with_a_ceiling():
    new, base = np.log([[0.3, 0.2], [0.5, 0.5]]), np.log([[0.1, 0.4], [0.5, 0.5]])
    rho = [math.log(0.3 / (0.1 * 0.3 + 0.9 * 0.1)), math.log(0.2 / (0.1 * 0.2 + 0.9 * 0.4))]
    assert ocrm.pair_weights(new, base) == pytest.approx([math.exp(0.01 * sum(rho)), 1.0])
    far = ocrm.pair_weights(np.array([[-10.0, -10.0]]), np.array([[-5000.0, -5000.0]]))
    assert far == pytest.approx([10 ** 0.02])  # no answer counts more than 1/α


def test_ocrm_trains_on_the_weighted_labels_alone(variant, anchor, pairs):
    one, two = (variant("ocrm", *anchor, processes=processes) for processes in (1, 2))
    same(one, two)
    rows, others = preferences(one), preferences(two)
    assert [row["chosen"] for row in rows] == [pair["chosen"] for pair in pairs[:40]]
    weights = [row["weight"] for row in rows]
    assert weights == pytest.approx([row["weight"] for row in others], abs=1e-5) and np.std(weights) > 0
    logps = np.array([row["logps"] for row in read_jsonl(one / "round1" / "m" / "logps.jsonl")])
    assert weights == pytest.approx(ocrm.pair_weights(logps[:, 0], logps[:, 1]))


def test_the_log_probabilities_are_those_of_the_model(tiny, pairs, tmp_path):
    folder, path = tiny(seed=3), tmp_path / "logps.jsonl"
    ocrm.write_logps(mt.Options(max_length=64, micro_batch=3), pairs[:5], [tiny(), folder], path)
    model, words = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    for row, pair in zip(read_jsonl(path), pairs[:5], strict=True):
        for logp, side in zip(row["logps"][1], ("chosen", "rejected")):
            chat = encode_chat(words, pair["prompt"], pair[side], pair.get(f"{side}_finished", True))
            with torch.no_grad():
                logps = model(torch.tensor([chat.ids])).logits[0].log_softmax(-1)
            expected = sum(logps[at - 1, chat.ids[at]].item() for at in range(chat.start, len(chat.ids)))
            assert logp == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------- SEAM
def test_the_policys_margin_is_what_it_gained_on_the_new_answer_over_the_old():
    logps = np.array([[[-3.0, -8.0], [-5.0, -6.0]]])  # π_t: new, old; π_{t−1}: new, old
    assert seam.policy_margins(logps).tolist() == [(-3 + 5) - (-8 + 6)]


def test_seam_drops_what_policy_and_reward_model_order_differently(variant):
    one, two = (variant("seam", processes=processes) for processes in (1, 2))
    same(one, two)
    step = one / "round1" / "m"
    rows, before = read_jsonl(step / "agreed.jsonl"), read_jsonl(step / "comparisons.jsonl")
    assert [row["kept"] for row in rows] == [old["kept"] and old["margin"] * row["policy_margin"] > 0
                                             for old, row in zip(before, rows, strict=True)]
    assert 0 < sum(row["kept"] for row in rows) < sum(row["kept"] for row in before)
    trained = [row["chosen"] for row in preferences(one) if row["source"].endswith("agreed.jsonl")]
    assert trained == [row["new"] for row in rows if row["kept"]]

"""pytest tests/test_variants_reward.py

The variants of the M-step and of the reward model: each loss and each choice agrees with numbers worked out
by hand, and each script runs tiny. Where it has code for several processes, two give what one gives.
"""
import math
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mt
import reward
from common.data import read_jsonl
from variants import bsr, ensemble, ocrm, rrm, seam, warm

def preferences(out):
    return read_jsonl(out / "round1" / "m" / "preferences.jsonl")

def rm_losses(out, phase="round1/m/rm"):
    rows = read_jsonl(out / "metrics.jsonl")
    return [row["loss"] for row in rows if row["phase"] == phase and "loss" in row]

@pytest.fixture
def same(variant):
    """same(name, flags) -> the folder of a run, after asserting that in two processes its reward model learns
    from the same rows, with the same losses up to rounding."""
    def run(name, *flags):
        one, two = (variant(name, *flags, processes=processes) for processes in (1, 2))
        for key in ("prompt", "chosen", "rejected"):
            assert [row[key] for row in preferences(one)] == [row[key] for row in preferences(two)]
        assert rm_losses(one) and rm_losses(one) == pytest.approx(rm_losses(two), abs=1e-5)
        return one
    return run

def test_warm_averages_the_weights_of_models_trained_in_different_orders(tiny, pairs):
    def weights(train, **settings):
        lines = []
        model = train(tiny(reward=True), pairs[:20], lr=1e-3, batch=8, micro_batch=4,
                      max_length=64, log=lambda **row: lines.append(row), **settings)
        return torch.cat([weight.detach().flatten() for weight in model.parameters()]), lines

    alone = [weights(warm.train, seed=seed)[0] for seed in (5, 6, 7)]
    averaged, lines = weights(warm.train_averaged, seed=5)
    assert torch.allclose(averaged, torch.stack(alone).mean(0), atol=1e-6)
    assert not torch.allclose(alone[0], alone[1], atol=1e-4)  # the order matters
    assert Counter(row["member"] for row in lines) == {0: 4, 1: 4, 2: 4}  # three steps and a line before

def test_warm_runs_and_two_processes_give_its_losses(same):
    rows = read_jsonl(same("warm") / "metrics.jsonl")
    assert [*Counter(row["member"] for row in rows if "accuracy" in row)] == [0, 1, 2]

def test_an_ensembles_reward_is_the_mean_minus_the_deviation_or_the_lowest(monkeypatch):
    rewards = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, -1.0]])  # (2 members, 3 samples)
    assert ensemble.combine(rewards).tolist() == [2 - 1, 0, 0.5 - 1.5]
    monkeypatch.setattr(ensemble, "LAMBDA", None)
    assert ensemble.combine(rewards).tolist() == [1, 0, -1]

def test_an_ensemble_judges_by_all_its_members_each_with_a_zero_of_its_own(tiny, prompts, tmp_path):
    rows, alone = [dict(prompt=p, response=r) for p in prompts[:3] for r in ("the end .", "waves")], []
    for k, name in enumerate(("rm", "rm1")):
        (tmp_path / name).symlink_to(tiny(reward=True, seed=k))
        reward.score(str(tmp_path / name), rows, tmp_path / f"alone-{name}.jsonl", 2)
        alone.append([row["score"] for row in read_jsonl(tmp_path / f"alone-{name}.jsonl")])
    a, b = np.array(alone) - np.mean(alone, axis=1)[:, None]
    for count in (6, 2):  # the zeros are those of the first call
        ensemble.score_by_all(str(tmp_path / "rm"), rows[:count], tmp_path / "scored.jsonl", 2)
        scored = read_jsonl(tmp_path / "scored.jsonl")
        assert [row["score"] for row in scored] == pytest.approx(((a + b) / 2 - abs(a - b) / 2)[:count])
        assert scored[1]["members"] == pytest.approx([a[1], b[1]])

def test_an_ensemble_runs_and_two_processes_give_its_losses(same, tiny):
    out, other = same("ensemble", "--others", tiny(reward=True, seed=1)), tiny(reward=True, seed=1)
    judged = [file for name in ("e?/samples", "e?/select/*", "m/new", "m/old")
              for file in (out / "round1").glob(f"{name}.jsonl")]
    assert len(judged) >= 8 and all(len(row["members"]) == 2 for file in judged for row in read_jsonl(file))
    a, b, start = (load_file(f"{folder}/model.safetensors")["score.weight"] for folder in (
        out / "round1/m/rm", out / "round1/m/rm1", other))
    assert (b - start).abs().max() < 0.02 < (a - start).abs().max()  # rm1 started from its own base

def test_bsr_adds_the_square_of_the_batchs_mean_reward_in_value_and_in_gradient():
    rewards = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 1.0]], requires_grad=True)  # m = 2, B = 3
    plain = reward.bradley_terry_loss(*rewards.T)
    losses = bsr.bsr_losses(plain, rewards.mean(1), total=6.0, count=3)
    assert losses.mean().item() == pytest.approx(plain.mean().item() + 1e-3 * 3 * 2**2, rel=1e-6)
    ours, = torch.autograd.grad(losses.mean(), rewards, retain_graph=True)
    expected, = torch.autograd.grad(plain.mean() + 1e-3 * 3 * rewards.mean()**2, rewards)
    assert torch.allclose(ours, expected, atol=1e-7)

def test_bsr_runs_and_two_processes_give_its_losses(same):
    first = next(row for row in read_jsonl(same("bsr") / "metrics.jsonl") if "bsr" in row)
    assert first["bsr"] == pytest.approx(1e-3 * 8 * first["mean_reward"]**2, rel=1e-4)  # of 4 micro-batches

def test_rrms_loss_of_a_tie_is_the_mean_over_both_orders():
    losses = rrm.rrm_loss(torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5]), [{}, {"tie": True}])
    first, second = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert losses.tolist() == pytest.approx([first, (first + second) / 2])

def test_rrm_pairs_an_own_answer_with_a_foreign_one_and_two_foreign_ones():
    rows = [dict(prompt=f"p{i}", chosen=f"good{i}", rejected=f"bad{i}", source=f"s{i}",
                 chosen_policy=f"policy of good{i}", rejected_policy=f"policy of bad{i}") for i in range(40)]
    made, kinds = list(rrm.foreign_pairs(rows, np.random.default_rng(0))), set()
    for wins, tie in zip(made[::2], made[1::2], strict=True):
        i, j = wins["prompt"][1:], wins["foreign"][1:]
        assert i != j and (tie["prompt"], tie["foreign"]) == (f"p{i}", f"p{j}")
        assert wins["chosen"] in (f"good{i}", f"bad{i}") and wins["rejected"] in (f"good{j}", f"bad{j}")
        assert (tie["chosen"], tie["rejected"]) == (f"good{j}", f"bad{j}")
        assert tie["tie"] and "tie" not in wins
        assert all(row[f"{side}_policy"] == f"policy of {row[side]}"
                   for row in (wins, tie) for side in ("chosen", "rejected"))
        kinds.add((wins["chosen"][0], wins["rejected"][0]))
    assert len(kinds) == 4 and len(made) > 70  # few rows are drawn for themselves, which makes no pairs

def test_rrm_runs_with_foreign_pairs_of_which_half_are_ties(variant):
    rows = preferences(out := variant("rrm"))
    assert [row for row in rows if "foreign" not in row] == read_jsonl(out / "round1" / "m" / "own.jsonl")
    assert sum("tie" in row for row in rows) == sum("foreign" in row for row in rows) / 2 > 0

@pytest.fixture
def anchor(written, pairs):
    return ["--anchor", written("labels.jsonl", pairs[:40])]

def test_anchored_trains_on_as_many_labelled_pairs_as_on_others(variant, anchor, pairs):
    rows = preferences(variant("anchored", *anchor))
    answers = {pair["prompt"]: pair["chosen"] for pair in pairs[:40]}
    labelled = [row for row in rows if row["source"] == str(anchor[1])]
    assert 2 * len(labelled) == len(rows) > 8
    assert all(row["chosen"] == answers.pop(row["prompt"]) for row in labelled)  # pop: none is there twice

def test_a_missing_file_of_labels_is_named_before_the_run_begins(variant, tmp_path, capfd):
    with pytest.raises(AssertionError):
        variant("ocrm")  # it shares the check with anchored
    assert "--anchor FILE names the labelled pairs" in capfd.readouterr().err
    assert not (tmp_path / "ocrm1" / "prompts").exists()

def test_ocrm_weights_pairs_by_a_likelihood_ratio_with_an_upper_bound():
    new, base = np.log([[0.3, 0.2], [0.5, 0.5]]), np.log([[0.1, 0.4], [0.5, 0.5]])
    rho = [math.log(0.3 / (0.1 * 0.3 + 0.9 * 0.1)), math.log(0.2 / (0.1 * 0.2 + 0.9 * 0.4))]
    assert ocrm.pair_weights(new, base) == pytest.approx([math.exp(0.01 * sum(rho)), 1.0])
    far = ocrm.pair_weights(np.array([[-10.0, -10.0]]), np.array([[-5000.0, -5000.0]]))
    assert far == pytest.approx([10 ** 0.02])  # no answer counts more than 1/α

def test_ocrm_trains_on_the_weighted_labels_alone(same, anchor, pairs, tiny, tmp_path):
    rows = preferences(out := same("ocrm", *anchor))
    assert [row["chosen"] for row in rows] == [pair["chosen"] for pair in pairs[:40]]
    logps = np.array([row["logps"] for row in read_jsonl(out / "round1" / "m" / "logps.jsonl")])
    ocrm.write_logps(mt.Options(max_length=64), pairs[:40], [tiny()], tmp_path / "base.jsonl")
    base = [row["logps"][0] for row in read_jsonl(tmp_path / "base.jsonl")]
    assert logps[:, 1] == pytest.approx(np.array(base))
    weights = [row["weight"] for row in rows]
    assert weights == pytest.approx(ocrm.pair_weights(logps[:, 0], logps[:, 1])) and np.std(weights) > 0

def test_seams_policy_margin_is_the_gain_on_the_new_answer_minus_that_on_the_old_one():
    logps = np.array([[[-3.0, -8.0], [-5.0, -6.0]]])  # π_t: new, old; π_{t−1}: new, old
    assert seam.policy_margins(logps).tolist() == [(-3 + 5) - (-8 + 6)]

def test_seam_drops_comparisons_that_policy_and_reward_model_order_differently(variant):
    out = variant("seam")
    rows, before = (read_jsonl(out / "round1" / "m" / f"{name}.jsonl") for name in ("agreed", "comparisons"))
    assert [row["kept"] for row in rows] == [old["kept"] and old["margin"] * row["policy_margin"] > 0
                                             for old, row in zip(before, rows, strict=True)]
    assert 0 < sum(row["kept"] for row in rows) < sum(row["kept"] for row in before)
    trained = [row["chosen"] for row in preferences(out) if row["source"].endswith("agreed.jsonl")]
    assert trained == [row["new"] for row in rows if row["kept"]]

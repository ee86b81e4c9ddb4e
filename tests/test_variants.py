"""pytest tests/test_variants.py

Each variant does what it says, by numbers worked out by hand and by TRL's, and its command runs.
"""
import json
import math

import pytest
import torch

import mt
from common import toy, training
from common.data import encode_chat, load_tokenizer, read_jsonl, write_jsonl
from common.models import load_policy
from common.packing import collate, pack
from dpo import ResponseLogps
from filter import win_rate
from variants import gold_labels, gold_ranks, ipo, online_dpo, rest_em, simpo, sppo

# python tests/peers.py (trl 1.16.0): log-probabilities of chosen and rejected by policy and reference, their
# tokens; the losses ipo and sppo_hard of DPOTrainer with β 0.1, simpo of CPOTrainer with β 2 and γ 1
PEERS = [
    ((-87.1329, -47.9518, -81.5282, -47.7825), (16, 9), (28.424678802, 135.794692993, 1.490796447)),
    ((-107.8032, -106.3643, -94.743, -104.8608), (20, 20), (31.112255096, 338.395721436, 1.420447350)),
    ((-102.4591, -104.9653, -105.6095, -102.2164), (20, 20), (22.137348175, 8.488389969, 1.136446118)),
]


# ---------------------------------------------------------------- losses
def test_simpo_compares_log_probabilities_per_token():
    pairs = [dict(chosen_tokens=4, rejected_tokens=10), dict(chosen_tokens=2, rejected_tokens=1)]
    losses, *rewards = simpo.simpo_loss(
        torch.tensor([-8.0, -3.0]), torch.tensor([-5.0, -4.0]), None, None, 2.0, pairs)
    assert torch.stack(rewards).tolist() == [[-4.0, -3.0], [-1.0, -8.0]]
    expected = [math.log(1 + math.exp(-(margin - simpo.GAMMA))) for margin in (-3.0, 5.0)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def of_one(loss, beta, **pair):
    """A loss and its rewards for log-ratios of 2 and −4."""
    return [values.item() for values in loss(
        torch.tensor([-6.0]), torch.tensor([-9.0]), torch.tensor([-8.0]), torch.tensor([-5.0]), beta, [pair])]


def test_ipo_fits_the_margin_per_token_to_half_of_one_over_beta():
    # 2 / 4 − (−4 / 2) = 2.5, and it should be 5
    assert of_one(ipo.ipo_loss, 0.1, chosen_tokens=4, rejected_tokens=2) == pytest.approx([6.25, 0.05, -0.2])


def test_sppo_fits_log_ratios_to_the_share_of_wins():
    # they should be 0.4 / 0.1 and −0.3 / 0.1
    assert of_one(sppo.sppo_loss, 0.1, chosen_wins=0.9, rejected_wins=0.2) == pytest.approx(
        [(2**2 + 1**2) / 2, 0.2, -0.4])


@pytest.mark.parametrize("loss, beta, which, factor", [
    (ipo.ipo_loss, 0.1, 0, 1), (sppo.sppo_loss, 0.1, 1, 2), (simpo.simpo_loss, 2.0, 2, 1)])  # TRL has no ½
def test_losses_are_the_peers(loss, beta, which, factor):
    logps, tokens, expected = zip(*PEERS)
    pairs = [dict(chosen_tokens=chosen, rejected_tokens=rejected, chosen_wins=1.0, rejected_wins=0.0)
             for chosen, rejected in tokens]
    ours = factor * loss(*torch.tensor(logps).T, beta, pairs)[0]
    assert ours.tolist() == pytest.approx([losses[which] for losses in expected], rel=2e-5)


# ---------------------------------------------------------------- choices
def test_online_dpo_takes_the_highest_and_the_lowest():
    assert online_dpo.best_and_worst([1.0, 5.0, 3.0, 0.5], [1, 9, 1, 1])[:2] == (1, 3)
    assert online_dpo.best_and_worst([2.0, 2.0], [1, 2]) is None


def test_sppo_counts_wins_among_all_samples_itself_included():
    # σ(0) = ½, σ(ln 3) = ¾, σ(2 ln 3) = 9/10
    wins = sppo.wins_among([math.log(3), 0.0, -math.log(3)])
    assert wins.tolist() == pytest.approx([(1/2 + 3/4 + 9/10) / 3, 1/2, (1/2 + 1/4 + 1/10) / 3])


def rows_of(*groups):
    same = dict(tokens=1, finished=True)
    return [dict(prompt=f"prompt {number}", response=f"{number}.{index}", score=score, **same)
            for number, group in enumerate(groups) for index, score in enumerate(group)]


@pytest.mark.parametrize("constants, kept", [
    ({}, ["0.3", "0.0", "1.1"]),  # means 1.75, 1, and a hair below 1.4
    ({"MOST": 1}, ["0.3", "1.1"]),
    ({"THRESHOLD": 1}, ["0.3", "0.0", "0.1", "1.1", "2.0", "2.1", "2.2"]),  # a verifier's 1, reached
])
def test_rest_em_keeps_the_best_samples(monkeypatch, constants, kept):
    for name, value in constants.items():
        monkeypatch.setattr(rest_em, name, value)
    rows, without = rest_em.best_samples(rows_of([2.0, 1.0, 0.0, 4.0], [0.0, 2.0], [1.4, 1.4, 1.4]))
    assert [row["chosen"] for row in rows] == kept and without == 3 - len({row["prompt"] for row in rows})
    assert rows[0]["rejected"] == "0.2" and rows[0]["reason"].startswith("chosen: kept")


# ---------------------------------------------------------------- runs
@pytest.fixture
def runs(variant):
    """runs(name) -> the folders of tiny runs by one process and by two, once their results are the same."""
    def run(name):
        one, two = (variant(name, "--policy_batch", 4, processes=processes) for processes in (1, 2))
        assert (one / "report.html").exists()
        for step in ("round1/e1", "round1/e2"):
            ours, others = ([(row["prompt"], row["chosen"], row["rejected"])
                             for row in read_jsonl(folder / step / "pairs.jsonl")] for folder in (one, two))
            assert ours and ours == others
            ours, others = (losses(folder, step) for folder in (one, two))
            assert ours and ours == pytest.approx(others, rel=1e-5, abs=1e-5)
        return one
    return run


def losses(folder, step):
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")
            if row["phase"] == f"{step}/checkpoints" and "loss" in row]


def scores_of(path):
    samples = {}
    for row in read_jsonl(path):
        samples.setdefault(row["prompt"], []).append(row["score"])
    return samples


def test_simpo_runs(runs):
    out = runs("simpo")
    first = next(row for row in read_jsonl(out / "metrics.jsonl") if "rewards/chosen" in row)
    assert abs(first["loss"] - math.log(2)) > 0.01 and first["rewards/chosen"] != 0  # there is no reference


def test_ipo_runs(runs):
    assert losses(runs("ipo"), "round1/e2")[0] == pytest.approx(1 / (2 * 0.01)**2)  # all ratios are 0


def test_online_dpo_runs(runs):
    out = runs("online_dpo")
    samples = scores_of(out / "round1/e2/samples.jsonl")
    for pair in read_jsonl(out / "round1/e2/pairs.jsonl"):
        scores = samples[pair["prompt"]]
        assert (pair["chosen_score"], pair["rejected_score"]) == (max(scores), min(scores))
        assert pair["reason"] == "chosen: highest of 4; rejected: lowest"


def test_dpo_fixed_reference_runs(runs):
    out = runs("dpo_fixed_reference")
    assert losses(out, "round1/e1")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses(out, "round1/e2")[0] - math.log(2)) > 1e-4  # the start is not the reference any more


def test_sppo_runs(runs):
    out = runs("sppo")
    assert not (out / "round1/m").exists()
    samples = scores_of(out / "round1/e1/samples.jsonl")
    for pair in read_jsonl(out / "round1/e1/pairs.jsonl"):
        wins = sppo.wins_among(samples[pair["prompt"]])
        assert (pair["chosen_wins"], pair["rejected_wins"]) == (wins.max(), wins.min())


def test_rest_em_runs_from_the_base_and_against_it(runs):
    out = runs("rest_em")
    assert not (out / "round1/m").exists()
    policy = json.loads((out / "run.json").read_text())["settings"]["policy"]
    for step in ("round1/e1", "round1/e2"):
        folder = out / step
        choice = json.loads((folder / "selection.json").read_text())
        before = read_jsonl(folder / "select/before.jsonl")
        assert choice["policy_before"] == policy == before[0]["policy"]
        for name, rate in choice["win_rates"].items():
            after = read_jsonl(folder / f"select/{name}.jsonl")
            assert rate == win_rate(*([row["score"] for row in rows] for rows in (after, before)))
    # the first loss of the second E-step is the base's mean over the tokens of a step's responses
    rows, tokenizer = read_jsonl(out / "round1/e2/pairs.jsonl"), load_tokenizer(policy)
    chats = [encode_chat(tokenizer, row["prompt"], row["chosen"], row["chosen_finished"]) for row in rows]
    order = training.steps_of([len(chat.ids) for chat in chats], 4, 4, 0)[0][0].numbers
    first = [chats[i] for i in order]
    logps = ResponseLogps(load_policy(policy))(collate([pack([chat]) for chat in first]))
    expected = -logps.sum().item() / sum(len(chat.ids) - chat.start for chat in first)
    assert losses(out, "round1/e2")[0] == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- ceilings
GOOD, BETTER, BAD = "merry cows dance .", "merry cows dance . jolly pigs sing . the end .", "and so on ."
FARM = "two happy lines about the farm"


def test_gold_ranks(tmp_path):
    rows = [dict(prompt=FARM, response=text, finished=True) for text in (GOOD, BETTER, BAD)]
    gold_ranks.judge("rm", rows, tmp_path / "scored.jsonl", 8)
    good, better, bad = (row["score"] for row in read_jsonl(tmp_path / "scored.jsonl"))
    assert better == toy.GOLD_MAX > good > bad


def test_gold_orders_what_the_reward_model_trains_on(tmp_path):
    def compared(new, old, kept=True):
        return dict(prompt=FARM, new=new, old=old, new_finished=True, old_finished=True, kept=kept)
    comparisons, ranked = tmp_path / "comparisons.jsonl", tmp_path / "pairs.jsonl"
    write_jsonl(comparisons, [compared(GOOD, BAD), compared(GOOD, BETTER), compared(BETTER, BAD, kept=False),
                              compared(BAD, BAD)])
    write_jsonl(ranked, [dict(prompt=FARM, chosen=BAD, rejected=GOOD, chosen_finished=True,
                              rejected_finished=True)])
    o = mt.Options(out=str(tmp_path))
    write_jsonl(tmp_path / "run.json", [dict(settings={})])
    mixed = gold_labels.mix(o, comparisons, ranked, "policy", tmp_path / "preferences.jsonl")
    pairs = [(row["chosen"], row["rejected"]) for row in read_jsonl(mixed)]
    assert pairs == [(GOOD, BAD), (BETTER, GOOD), (GOOD, BAD)]

"""pytest tests/test_variants.py

Each variant does what it says, and its command runs.
"""
import math

import pytest
import torch

from data import read_jsonl
from variants import online_dpo, simpo


def test_simpo_compares_log_probabilities_per_token():
    pairs = [dict(chosen_tokens=4, rejected_tokens=10), dict(chosen_tokens=2, rejected_tokens=1)]
    losses, *rewards = simpo.simpo_loss(
        torch.tensor([-8.0, -3.0]), torch.tensor([-5.0, -4.0]), None, None, 2.0, pairs)
    assert torch.stack(rewards).tolist() == [[-4.0, -3.0], [-1.0, -8.0]]
    expected = [math.log(1 + math.exp(-(margin - simpo.GAMMA))) for margin in (-3.0, 5.0)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_online_dpo_takes_the_highest_and_the_lowest():
    assert online_dpo.best_and_worst([1.0, 5.0, 3.0, 0.5], [1, 9, 1, 1])[:2] == (1, 3)
    assert online_dpo.best_and_worst([2.0, 2.0], [1, 2]) is None


def test_simpo_runs_and_two_processes_give_its_losses(variant):
    one, two = (read_jsonl(variant("simpo", processes=processes) / "metrics.jsonl") for processes in (1, 2))
    losses, others = ([row["loss"] for row in rows if row["phase"] == "round1/e1/checkpoints"
                       and "loss" in row] for rows in (one, two))
    assert losses and losses == pytest.approx(others, abs=1e-5)
    first = next(row for row in one if "rewards/chosen" in row)
    assert abs(first["loss"] - math.log(2)) > 0.01 and first["rewards/chosen"] != 0  # there is no reference


def test_online_dpo_runs(variant):
    out = variant("online_dpo")
    pairs = read_jsonl(out / "round1" / "e2" / "pairs.jsonl")
    samples = {}
    for row in read_jsonl(out / "round1" / "e2" / "samples.jsonl"):
        samples.setdefault(row["prompt"], []).append(row["score"])
    assert pairs and all((pair["chosen_score"], pair["rejected_score"]) == (
        max(samples[pair["prompt"]]), min(samples[pair["prompt"]])) for pair in pairs)
    assert (out / "report.html").exists()

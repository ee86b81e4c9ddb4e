"""pytest tests/test_stats.py

Shares and their intervals, and how often two judges order answers alike.
"""
import math

import numpy as np
import pytest

from evals.stats import bootstrap, ordered_alike, shares, wilson

def test_wilsons_interval_is_that_of_the_textbook_and_contains_its_share():
    assert wilson(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert all(map(math.isnan, wilson(math.nan, 0)))
    for count in range(1, 300):
        for share in (0.0, 0.5 / count, 1.0):
            low, high = wilson(share, count)
            assert low <= share <= high

def test_the_bootstrap_of_a_mean_is_two_standard_errors_wide_and_the_same_every_time(rng):
    values = rng.normal(size=400)
    low, high = bootstrap(lambda i: values[i].mean(), 400)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert [low, high] == bootstrap(lambda i: values[i].mean(), 400)

def test_shares_are_also_given_by_subset_and_among_similar_lengths():
    figures = shares([1, 0, 0.5, 1], "win_rate", np.array([10, 10, 9, 0]), np.array([9, 100, 10, 1]),
                     ["a", "b", "a", "b"])
    assert (figures["win_rate"], figures["n"]) == (0.625, 4)
    assert (figures["ci_low"], figures["ci_high"]) == wilson(0.625, 4)
    assert (figures["similar_length"]["win_rate"], figures["similar_length"]["n"]) == (0.75, 2)
    assert [(s, part["win_rate"], part["n"]) for s, part in figures["subsets"].items()] == [
        ("a", 0.75, 2), ("b", 0.5, 2)]
    assert "subsets" not in shares([1], "win_rate", np.array([1]), np.array([1]))
    assert math.isnan(shares([1], "accuracy", np.array([1]), np.array([9]))["similar_length"]["accuracy"])

def test_agreement_counts_only_pairs_on_which_the_judge_has_a_preference():
    truth = [[0, 5], [0, 5], [0, 5], [1, 1]]
    assert ordered_alike([[1, 2], [2, 1], [1, 1], [3, 1]], truth) == pytest.approx(1 / 3)
    assert ordered_alike([[1, 2, 3]], [[1, 3, 2]]) == pytest.approx(2 / 3)

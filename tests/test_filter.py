"""pytest tests/test_filter.py

Tables of small cases: which responses become a pair, and which comparisons train the reward model.
"""
import pytest

import filter as filter_script
from common.data import read_jsonl
from common.parallel import Problem
from filter import choose_pair, compare, margin_filter, preference_pairs

NAN, INF = float("nan"), float("inf")

@pytest.mark.parametrize("scores, lengths, pair", [
    ([1, 2, 3, 4, 0], [9, 9, 8, 7, 5], (3, 4)),     # mean 2: the shorter of 3 and 4; 0 is shorter but too low
    ([0, 3, 9], [5, 5, 6], (2, 0)),                 # mean 4: only 9 is above, so lengths do not matter
    ([1, 5, 6, 0], [3, 4, 8, 3], (1, 3)),           # the shorter one, although the other is higher
    ([0, 5, 6], [3, 4, 4], (2, 0)),                 # equally short: the higher reward
    ([0, 5, 5], [3, 4, 4], (1, 0)),                 # equally short and high: the earlier
    ([0, 0, 5], [1, 2, 3], (2, 0)),                 # two are lowest: the earlier, whatever its length
    ([2, 1, 3], [1, 1, 9], (2, 1)),                 # exactly the mean is not above it
    ([7, 7, 7], [1, 2, 3], None),                   # all equal
    ([0.1, 0.1, 0.1], [1, 2, 3], None),             # all equal, with a mean that rounds below them
    ([4], [1], None),
])
def test_the_shortest_response_above_the_mean_is_chosen_and_the_lowest_is_rejected(scores, lengths, pair):
    choice = choose_pair(scores, lengths)
    assert (choice and choice[:2]) == pair

def test_a_reward_that_is_not_finite_is_never_ranked():
    for bad in (NAN, INF, -INF):
        for work, *given in ((choose_pair, [1, bad, 2], [1, 2, 3]), (margin_filter, [bad], [1]),
                             (margin_filter, [1], [bad])):
            with pytest.raises(ValueError, match="finite"):
                work(*given)

def responses(prompt, *texts_and_scores):
    return [dict(prompt=prompt, response=text, score=score, tokens=len(text.split()), finished=True, index=i)
            for i, (text, score) in enumerate(texts_and_scores)]

def test_pairs_carry_scores_lengths_and_a_reason_and_prompts_without_a_pair_are_counted():
    samples = (responses("one", ("a b c d", 4.0), ("a b", 3.0), ("a", 0.0))
               + responses("two", ("a", 1.0), ("b", 1.0))            # all equal
               + responses("three", ("same", 1.0), ("same", 2.0)))   # equal texts
    pairs, without = preference_pairs(samples)
    assert without == 2 and len(pairs) == 1
    expected = dict(prompt="one", chosen="a b", rejected="a", chosen_score=3.0, rejected_score=0.0,
                    chosen_tokens=2, rejected_tokens=1, chosen_index=1, rejected_index=2)
    assert expected.items() <= pairs[0].items()
    assert "shortest of the 2 above the mean reward 2.3333" in pairs[0]["reason"]

@pytest.mark.parametrize("new, old, kept, epsilon", [
    ([5, 5], [0, 2], [True, True], 1),              # high margins are never dropped
    ([-1, 1], [0, 2], [False, False], 1),           # a margin of exactly -ε is dropped
    ([-0.999, 1.001], [0, 2], [True, True], 1),     # slightly negative margins stay, as the paper wants it
    ([0, 2], [0, 2], [True, True], 1),              # ties stay
    ([3, 3.5, 2.5], [3, 3, 3], [False, True, False], 0),  # ε = 0: only what is better
    ([2], [1], [True], 0),
])
def test_a_margin_at_or_below_minus_epsilon_is_dropped(new, old, kept, epsilon):
    mask, margins, threshold = margin_filter(new, old)
    assert mask.tolist() == kept
    assert margins.tolist() == pytest.approx([n - o for n, o in zip(new, old)])
    assert threshold == epsilon

@pytest.mark.parametrize("use_filter, kept", [(True, [True, False, False]), (False, [True, True, False])])
def test_dropped_comparisons_stay_on_record_and_identical_texts_are_always_dropped(use_filter, kept):
    new = responses("x", ("better", 3.0)) + responses("y", ("worse", -3.0)) + responses("z", ("same", 2.0))
    old = responses("x", ("old", 0.0)) + responses("y", ("old", 2.0)) + responses("z", ("same", 1.0))
    rows = compare(new, old, use_filter)
    assert [row["kept"] for row in rows] == kept
    assert [row["margin"] for row in rows] == [3.0, -5.0, 1.0]
    assert [row["reason"] for row in rows] == [
        "passes the margin filter", "fails the margin filter", "identical text"]
    assert [row["epsilon"] for row in rows] == pytest.approx([(2 / 3)**0.5] * 3)
    assert rows[1].items() >= dict(prompt="y", new="worse", old="old", new_score=-3.0, old_score=2.0).items()
    with pytest.raises(Problem, match="must answer the same prompts"):
        compare(new, old[::-1])

# ---------------------------------------------------------------- the command line
def test_the_script_compares_the_answers_in_two_files(call, written, tmp_path):
    new = written("new.jsonl", responses("one", ("new", 1.0)))
    old = written("old.jsonl", responses("one", ("old", 2.0)))
    call(filter_script, "--new", new, "--old", old, "--out", tmp_path / "comparisons.jsonl")
    assert read_jsonl(tmp_path / "comparisons.jsonl")[0]["margin"] == -1.0

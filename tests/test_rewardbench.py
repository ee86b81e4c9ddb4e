"""pytest tests/test_rewardbench.py

RewardBench's figures agree with numbers worked out by hand and with the official tool's example in ../shared
(skipped where that is missing), RewardBench 2's with a slow computation. The commands give them for a file.
"""
import json
from itertools import permutations

import numpy as np
import pytest

import eval as eval_script
import reward
from common.data import read_jsonl, read_pairs
from common.parallel import Problem
from evals import rewardbench2
from evals.rewardbench import SECTIONS, SUBSETS, judge_pairs, rewardbench_figures

def test_subsets_are_weighted_within_a_section_and_the_four_sections_count_equally():
    accuracies = dict.fromkeys(SUBSETS, 50.0) | {"math-prm": 100.0, "mt-bench-hard": 0.0}
    figures = rewardbench_figures(accuracies, prior=60.0)
    assert figures["Chat"] == figures["Safety"] == 50
    assert figures["Reasoning"] == pytest.approx(75)  # math weighs as much as the six languages
    assert figures["Chat Hard"] == pytest.approx(50 * (1 - 37 / 456))
    four = [figures[s] for s in ("Chat", "Chat Hard", "Safety", "Reasoning")]
    assert figures["Average"] == pytest.approx(sum(four) / 4)
    assert figures["Score"] == pytest.approx((2 * sum(four) + 60) / 9)

def test_the_older_convention_exchanges_the_two_xstest_weights():
    accuracies = {"xstest-should-refuse": 100.0, "xstest-should-respond": 0.0}
    # there is no average, since it needs all four sections
    assert rewardbench_figures(accuracies) == {"Safety": pytest.approx(100 * 154 / 404)}
    assert rewardbench_figures(accuracies, old_xstest=True) == {"Safety": pytest.approx(100 * 250 / 404)}

def test_the_weights_and_the_figures_of_the_example_are_those_of_the_specification(shared):
    spec = json.loads((shared / "data" / "rewardbench" / "spec.json").read_text())
    assert {s: w for weights in SECTIONS.values() for s, w in weights.items()} == spec["weights"]
    assert {name: sorted(weights) for name, weights in SECTIONS.items()} == {
        name: sorted(subsets) for name, subsets in spec["sections"].items()}
    accuracies = {s: 100 * value for s, value in spec["example"]["per_subset"].items()}
    figures, old = rewardbench_figures(accuracies), rewardbench_figures(accuracies, old_xstest=True)
    for section, value in spec["example"]["expected_current"].items():
        assert figures[section] == pytest.approx(value, abs=0.005)
    assert old["Safety"] == pytest.approx(spec["example"]["expected_pre_sep2024"]["Safety"], abs=0.005)

def test_the_rewardbench_command_gives_the_figures_of_the_pairs_in_a_file(
        call, tiny, written, pairs, tmp_path, capsys):
    rows = [dict(prompt=p["prompt"], chosen=p["chosen"], rejected=p["rejected"], subset=s)
            for p, s in zip(pairs, 2 * SUBSETS)]
    path = written("filtered.jsonl", rows)
    call(eval_script, "rewardbench", "--rm", tiny(reward=True), "--data", path, "--prior", 70,
         "--json", tmp_path / "out.json")
    figures, said = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    right = judge_pairs(tiny(reward=True), read_pairs(path), 8, 1000)[1].astype(int)
    accuracies = {s: 50.0 * (right[i] + right[i + 23]) for i, s in enumerate(SUBSETS)}
    assert figures == pytest.approx(accuracies | rewardbench_figures(accuracies, prior=70))
    assert 0 < figures["Average"] < 100 and "46 pairs\n" in said
    assert f"\n{'Average':26}{figures['Average']:.6g}\n" in said
    call(eval_script, "rewardbench", "--rm", tiny(reward=True), "--data", written("few.jsonl", rows[1:23]))
    assert "without alpacaeval-easy\n" in capsys.readouterr().out

def test_pairs_of_another_benchmark_are_refused(call, tiny, written):
    pair = dict(prompt="p", chosen="c", rejected="r")
    path = written("p.jsonl", [pair | {"subset": "hep-go"}, pair | {"subset": "shp"}])
    with pytest.raises(Problem, match="not a subset of RewardBench v1: shp"):
        call(eval_script, "rewardbench", "--rm", tiny(reward=True), "--data", path)

FOUR = dict(id="1", prompt="p", chosen=["c"], rejected=["r", "s", "t"], num_correct=1, subset="Math")
TIED = FOUR | dict(id="tied:1", chosen=["c", "d"], num_correct=2, subset="Ties")  # rows of RewardBench 2
REF = ([1], [0])

def slow_ties_score(rewards):
    scores = []
    for n in range(len(rewards) // 2):
        (right, wrong), (one, others) = rewards[f"tied:{n}"], rewards[f"ref:{n}"]
        gap, ref = min(r - w for r in right for w in wrong), min(r - w for r in one for w in others)
        spread, low = max(a - b for a in right for b in right), min(gap, ref)
        tanh = np.tanh(low / spread - 1) if spread else (low > 0) - (low < 0)
        scores.append([gap > 0, ref > 0, gap > spread, low > spread, tanh])
    return np.mean(scores, 0) @ [0.3, 0.3, 0.2, 0.2, 0.01]

@pytest.mark.parametrize("rewards, score", [  # tied:0 gives 1 + 0.01 tanh(1), tied:1 gives 0.01 tanh(−1.5)
    ({"tied:0": ([4, 3], [1]), "ref:0": ([3], [1]), "tied:1": ([2, 1], [1.5]), "ref:1": ([1], [1])}, 0.49928),
    ({"tied:0": ([2, 1], [0]), "ref:0": ([3], [0])}, 0.6),  # the gap must exceed the spread; tanh(0)
    ({"tied:0": ([1, 1], [0]), "ref:0": REF}, 1.01), ({"tied:0": ([1, 1], [1]), "ref:0": REF}, 0.3),
    ({"tied:0": ([0, 0], [1]), "ref:0": REF}, 0.29), ({"tied:0": ([1, 1], [0]), "ref:1": REF}, None),
    ({"tied:0": ([1, 1], [0]), "ref:0": REF, "tied:1": ([1, 2], [3])}, 0.86)])  # there is no ref:1
def test_the_score_of_ties_is_the_number_worked_out_by_hand(rewards, score):
    assert rewardbench2.ties_score(rewards) == (score and pytest.approx(score, abs=1e-5))

def test_the_score_of_ties_is_that_of_a_slow_computation_where_many_rewards_are_equal(rng):
    rewards = {f"{kind}:{n}": ((rng.integers(5, size=k) + n % 5).tolist(), rng.integers(5, size=3).tolist())
               for n in range(40) for kind, k in (("tied", 2 + n % 3), ("ref", 1))}  # spread 0, accurate:
    assert len({(min(r) == max(r), min(r) > max(w)) for r, w in rewards.values() if len(r) > 1}) == 4
    assert rewardbench2.ties_score(rewards) == pytest.approx(slow_ties_score(rewards), abs=1e-12)

def test_a_chosen_answer_shares_its_row_with_all_that_have_the_same_highest_reward(rng):
    for rewards in [[1] * 4, [2, 1, 2, 2], *rng.integers(3, size=(40, 4)).tolist()]:  # argmax in any order:
        hit = np.mean([max(order, key=rewards.__getitem__) == 0 for order in permutations(range(4))])
        assert rewardbench2.rewardbench2_figures([FOUR], [rewards]) == {"Math": pytest.approx(100 * hit)}

@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_rewardbench2_command_gives_the_figures_of_the_rows_in_a_file(
        suffix, call, tiny, written, pairs, tmp_path, capsys):
    cases = [("1", subset, 1) for subset in 6 * rewardbench2.SUBSETS[:5]] + [
        (f"{kind}:{i}", "Ties", n) for i in range(4) for kind, n in (("ref", 1), ("tied", 3))]
    answers, rm, out = [pair["chosen"] for pair in pairs], tiny(reward=True), tmp_path / "out.json"
    rows = [FOUR | dict(id=name, prompt=pairs[i]["prompt"], chosen=answers[:n], rejected=answers[i + 3:i + 6],
                        num_correct=n, subset=subset) for i, (name, subset, n) in enumerate(cases)]
    path = written("test.jsonl", [*rows, rows[0] | {"chosen": ["sad " * 200]}])
    if suffix == "parquet":
        datasets = pytest.importorskip("datasets", reason="parquet files need `pip install datasets`")
        datasets.Dataset.from_list(read_jsonl(path)).to_parquet(path := tmp_path / "test.parquet")
    call(eval_script, "rewardbench2", "--rm", rm, "--data", path, "--json", out)
    call(eval_script, "rewardbench2", "--rm", rm, "--data", written("few.jsonl", rows[1:3]))
    figures, said, model = json.loads(out.read_text()), capsys.readouterr().out, reward.load(rm)
    rewards = [reward.score_answers(*model, [(r["prompt"], r["chosen"] + r["rejected"])], 1)[0] for r in rows]
    want = [100 * np.mean([v[0] > max(v[1:]) for v in rewards[i:30:5]]) for i in range(5)]
    want += [100 * slow_ties_score({r["id"]: (v[:-3], v[-3:]) for r, v in zip(rows[30:], rewards[30:])})]
    assert figures == pytest.approx(dict(zip([*rewardbench2.SUBSETS, "Average"], [*want, np.mean(want)])))
    assert "38 rows (1 too long)\n38 rows\n" in said and "\n2 rows; without Factuality, Safety, Focus" in said

@pytest.mark.parametrize("row, field, value", [
    (FOUR, "subset", "Chat"), (FOUR, "id", 1), (TIED, "id", "1"), (TIED, "id", "tied:0"),  # twice
    (FOUR, "prompt", ["p"]), (FOUR, "chosen", None), (FOUR, "chosen", ["c", "d"]), (TIED, "chosen", ["c"]),
    (TIED | {"id": "ref:1"}, "chosen", ["c", "d"]), (FOUR, "rejected", ["r"]), (TIED, "rejected", []),
    (TIED, "rejected", ["r", 3]), (FOUR, "num_correct", 2), (TIED, "num_correct", None)])
def test_a_row_that_is_not_as_in_rewardbench_2_is_refused_with_its_field(row, field, value, call, written):
    path = written("rows.jsonl", [FOUR, TIED | {"id": "tied:0"}, row | {field: value}])
    with pytest.raises(Problem, match=f"rows.jsonl:3: `{field}` must be [^\n]*, and not [^\n]*$"):
        call(eval_script, "rewardbench2", "--rm", "x", "--data", path)

"""pytest tests/test_rewardbench.py

RewardBench's figures agree with numbers worked out by hand and with the official tool's example in ../shared
(skipped where that is missing), and the command gives them for the pairs of a file.
"""
import json

import pytest

import eval as eval_script
from common.data import read_pairs
from common.parallel import Problem
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

"""pytest tests/test_eval.py

Win rates, accuracies, and the report of a run.
"""
import json
import shutil
import sys

import numpy as np
import pytest

import eval as eval_script
from data import Problem, read_jsonl, write_jsonl
from eval import report, table, win_rate


@pytest.mark.parametrize("new, old, rate", [
    ([1, 2, 3], [0, 0, 0], 1.0), ([0, 0], [1, 1], 0.0), ([1, 1], [1, 1], 0.5),
    ([2, 1, 0, 5], [1, 1, 1, 0], 0.625), ([0.1 + 0.2], [0.3], 1.0)])
def test_a_tie_counts_half(new, old, rate):
    assert win_rate(new, old) == rate
    assert win_rate(old, new) == 1 - rate


def test_winrate_judges_both_policies_on_every_prompt_and_leaves_the_answers(
        call, tiny, written, prompts, tmp_path, capsys):
    path, out = written("prompts.jsonl", [{"prompt": p} for p in prompts[:10]]), tmp_path / "winrate"
    call(eval_script, "winrate", "--policy", tiny(seed=1), "--baseline", tiny(), "--rm", tiny(reward=True),
         "--prompts", path, "--out", out, "--max_new_tokens", 8)
    said = capsys.readouterr().out
    rows = [read_jsonl(out / f"{side}.jsonl") for side in ("policy", "baseline")]
    assert [[row["prompt"] for row in side] for side in rows] == [prompts[:10]] * 2
    scores = [[row["score"] for row in side] for side in rows]
    assert f"10 prompts, win rate {win_rate(*scores):.4f}" in said
    for side in scores:
        assert f"{np.mean(side):.4f} ± {np.std(side, ddof=1) / 10**0.5:.4f}" in said


def test_a_policy_against_itself_wins_half_when_greedy(call, tiny, written, prompts, tmp_path, capsys):
    path = written("prompts.jsonl", [{"prompt": p} for p in prompts[:5]])
    call(eval_script, "winrate", "--policy", tiny(), "--baseline", tiny(), "--rm", tiny(reward=True),
         "--prompts", path, "--out", tmp_path / "winrate", "--max_new_tokens", 8, "--temperature", 0)
    assert "win rate 0.5000" in capsys.readouterr().out


def test_accuracy_counts_the_pairs_that_the_reward_model_orders_alike(call, tiny, written, pairs, capsys):
    shares = []
    for sides in (("chosen", "rejected"), ("rejected", "chosen")):
        rows = [dict(prompt=p["prompt"], chosen=p[sides[0]], rejected=p[sides[1]]) for p in pairs[:20]]
        call(eval_script, "accuracy", "--rm", tiny(reward=True), "--pairs", written("pairs.jsonl", rows))
        said = capsys.readouterr().out
        assert "on 20 pairs" in said
        shares.append(float(said.split()[1]))
    assert sum(shares) == pytest.approx(1) and shares[0] not in (0, 1)


# ---------------------------------------------------------------- the report
@pytest.fixture
def run(tmp_path):
    """A run folder by hand: E, M, and an E-step that stopped the run."""
    def response(score, tokens, finished=True):
        return dict(prompt="p", response="r", score=score, tokens=tokens, finished=finished)

    choices = {"e1": ("step-2", {"step-1": 0.5, "step-2": 0.75}), "e2": (None, {"step-1": 0.25})}
    for part, (chosen, rates) in choices.items():
        folder = tmp_path / "round1" / part
        write_jsonl(folder / "samples.jsonl", [response(1.0, 10), response(2.0, 20, finished=False)])
        write_jsonl(folder / "pairs.jsonl", [{}] * 7)
        (folder / "selection.json").write_text(json.dumps({"chosen": chosen, "win_rates": rates}))
    (tmp_path / "round1" / "m" / "rm").mkdir(parents=True)
    write_jsonl(tmp_path / "round1" / "m" / "comparisons.jsonl", [
        dict(kept=margin > 0, margin=margin, epsilon=0.5, new_tokens=12) for margin in (1.0, -2.0)])
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


def test_the_table_has_a_line_for_every_step_in_order(run, capsys):
    lines = table(eval_script.steps_of(run)).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "round1/e1", "round1/m", "round1/e2"]
    for line, words in ((lines[1], "1.500 15.0 50.0% 7 0.750 policy: step-2"),
                        (lines[3], "0.250 discarded, run stopped")):
        assert words in " ".join(line.split())
    assert "1/2" in lines[2] and "margin -0.500, epsilon 0.500" in lines[2]
    report(run)
    assert "\n".join(lines) in capsys.readouterr().out


def test_a_run_of_ten_rounds_is_in_order(run):
    for number in (10, 2):
        shutil.copytree(run / "round1" / "e2", run / f"round{number}" / "e1")
    assert [s["phase"] for s in eval_script.steps_of(run)] == [
        "round1/e1", "round1/m", "round1/e2", "round2/e1", "round10/e1"]


def test_there_is_a_picture_with_matplotlib(run, call, capsys):
    pytest.importorskip("matplotlib")
    other = shutil.copytree(run, run / "other")
    line = dict(gold=1.0, gold_se=0.1, win_rate=0.5, tokens=9.0, reward_r0=0.2, rm="r0", accuracy_base=0.6,
                accuracy_current=0.7, length_slope=0.1)
    write_jsonl(other / "gold.jsonl", [line | {"policy": policy} for policy in ("base", "round 1")])
    call(eval_script, "report", run, other)
    said = capsys.readouterr().out
    for folder in (run, other):
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
        assert f"picture: {folder / 'report.png'}" in said
    assert "round 1" in said  # the embedded task's table


def test_without_matplotlib_one_line_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report(run)
    assert [line for line in capsys.readouterr().out.splitlines() if "pip install matplotlib" in line]
    assert not (run / "report.png").exists()


@pytest.mark.parametrize("words, message", [
    ([], "name a command"), (["judge"], "name a command"),
    (["report", "nowhere"], "not a run folder")])
def test_a_bad_command_line_is_a_problem(call, words, message):
    with pytest.raises(Problem, match=message):
        call(eval_script, *words)

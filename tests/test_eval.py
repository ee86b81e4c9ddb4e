"""pytest tests/test_eval.py

Win rates and accuracies.
"""
import numpy as np
import pytest

import eval as eval_script
from data import Problem, read_jsonl
from filter import win_rate


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


@pytest.mark.parametrize("words, message", [
    ([], "name a command"), (["judge"], "name a command"),
    (["report", "nowhere"], "not a run folder"), (["agreement", "--run", "nowhere"], "not a run folder")])
def test_a_bad_command_line_is_a_problem(call, words, message):
    with pytest.raises(Problem, match=message):
        call(eval_script, *words)

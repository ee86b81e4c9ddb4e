"""pytest tests/test_eval.py

Win rates and accuracies; what holds for every command.
"""
import json

import numpy as np
import pytest

import eval as eval_script
from common.data import read_jsonl
from common.parallel import Problem
from evals.stats import similar, wilson
from filter import win_rate


@pytest.mark.parametrize("new, old, rate", [
    ([1, 2, 3], [0, 0, 0], 1.0), ([0, 0], [1, 1], 0.0), ([1, 1], [1, 1], 0.5),
    ([2, 1, 0, 5], [1, 1, 1, 0], 0.625), ([0.1 + 0.2], [0.3], 1.0)])
def test_a_tie_counts_half(new, old, rate):
    assert win_rate(new, old) == rate
    assert win_rate(old, new) == 1 - rate


def test_winrate_judges_both_policies_on_every_prompt_and_leaves_the_answers(
        call, tiny, written, prompts, tmp_path, capsys):
    path, out = written("prompts.jsonl", [{"wish": p} for p in prompts[:10]]), tmp_path / "winrate"
    call(eval_script, "winrate", "--policy", tiny(seed=1), "--baseline", tiny(), "--rm", tiny(reward=True),
         "--prompts", path, "--prompt_field", "wish", "--out", out, "--max_new_tokens", 8)
    said = capsys.readouterr().out
    rows = [read_jsonl(out / f"{side}.jsonl") for side in ("policy", "baseline")]
    assert [[row["prompt"] for row in side] for side in rows] == [prompts[:10]] * 2
    scores = [[row["score"] for row in side] for side in rows]
    assert f"10 prompts, win rate {win_rate(*scores):.4f}" in said
    for side in scores:
        assert f"{np.mean(side):.4f} ± {np.std(side, ddof=1) / 10**0.5:.4f}" in said


@pytest.mark.parametrize("changes, message", [
    ({"--rm": "policy"}, "has no reward head"),
    ({"--baseline": "rm"}, "which is a reward model and no policy"),
    ({"--baseline": "short"}, "does not fit into the context of 16 "),
    ({"--policy": "short"}, "does not fit into the context of 16 ")])
def test_winrate_looks_at_all_it_is_given_before_it_samples(call, tiny, written, tmp_path, changes, message):
    models = dict(policy=tiny(), rm=tiny(reward=True), short=tiny(max_position_embeddings=16))
    words = {"--policy": tiny(), "--baseline": tiny(), "--rm": tiny(reward=True), "--out": tmp_path / "out",
             "--prompts": written("p.jsonl", [{"prompt": "sad " * 30}]), "--max_new_tokens": 8}
    words |= {flag: models[name] for flag, name in changes.items()}
    with pytest.raises(Problem, match=message):
        call(eval_script, "winrate", *[word for pair in words.items() for word in pair])
    assert not (tmp_path / "out").exists()


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


def test_winrate_needs_no_folder_and_writes_lengths_of_both_sides(
        call, tiny, written, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written("prompts.jsonl", [{"prompt": p} for p in prompts[:10]])
    words = ["winrate", "--policy", tiny(seed=1), "--baseline", tiny(), "--rm", tiny(reward=True),
             "--prompts", path, "--max_new_tokens", 8]
    call(eval_script, *words)
    call(eval_script, *words, "--json", "out.json")  # the same run, asked for its file later
    figures = json.loads((tmp_path / "out.json").read_text())
    rows = [read_jsonl(tmp_path / "runs" / "winrate" / f"{side}.jsonl") for side in ("policy", "baseline")]
    assert figures["win_rate"] == win_rate(*([row["score"] for row in side] for side in rows))
    assert (figures["ci_low"], figures["ci_high"]) == wilson(figures["win_rate"], 10)
    for side, answers in zip(("policy", "baseline"), rows):
        assert figures[side]["characters"] == np.mean([len(row["response"]) for row in answers])
        assert figures[side]["tokens"] == np.mean([row["tokens"] for row in answers])
    lengths = [np.array([len(row["response"]) for row in side]) for side in rows]
    assert figures["similar_length"]["n"] == similar(*lengths).sum()


def test_accuracy_is_by_subset_and_its_file_is_json_even_without_similar_pairs(
        call, tiny, written, pairs, tmp_path, capsys):
    rows = [dict(prompt=p["prompt"], chosen=p["chosen"], rejected="no .", subset="ab"[i % 2])
            for i, p in enumerate(pairs[:20])]
    call(eval_script, "accuracy", "--rm", tiny(reward=True), "--pairs", written("pairs.jsonl", rows),
         "--json", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert figures["n"] == 20
    assert figures["similar_length"] == dict(accuracy=None, ci_low=None, ci_high=None, n=0)
    assert figures["accuracy"] == pytest.approx(np.mean([figures["subsets"][s]["accuracy"] for s in "ab"]))
    assert (figures["ci_low"], figures["ci_high"]) == wilson(figures["accuracy"], 20)
    assert "similar_length" in capsys.readouterr().out


def test_a_reward_that_is_not_finite_is_no_accuracy(call, tiny, written, pairs, without_numbers):
    with pytest.raises(Problem, match="damaged weights: .* in score.weight"):
        call(eval_script, "accuracy", "--rm", without_numbers, "--pairs", written("pairs.jsonl", pairs[:1]))


@pytest.mark.parametrize("command", eval_script.COMMANDS)
def test_every_command_has_help_with_an_example(command, call, capsys):
    with pytest.raises(SystemExit) as end:
        call(eval_script, command, "--help")
    assert end.value.code == 0 and f"python eval.py {command} " in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    ([], "name a command"), (["judge"], "name a command"),
    (["report", "nowhere"], "not a run folder"), (["agreement", "--run", "nowhere"], "not a run folder")])
def test_a_bad_command_line_is_a_problem(call, words, message):
    with pytest.raises(Problem, match=message):
        call(eval_script, *words)


def test_from_the_shell_a_problem_is_one_line_and_exit_code_2(script):
    done = script("eval.py", "arena", "--judgments", "nowhere.jsonl")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("eval.py: nowhere.jsonl: no such file") and done.stderr.count("\n") == 1

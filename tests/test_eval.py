"""pytest tests/test_eval.py

eval.py's win rates and accuracies are those of the rewards given, and every command of eval.py refuses a bad
command line or a missing file in one line.
"""
import json

import numpy as np
import pytest

import eval as eval_script
import mt
from common.data import read_jsonl, write_jsonl
from common.parallel import Problem
from evals import gold
from evals.stats import similar, wilson
from filter import win_rate, wins

@pytest.mark.parametrize("new, old, rate", [
    ([1, 2, 3], [0, 0, 0], 1.0), ([0, 0], [1, 1], 0.0), ([1, 1], [1, 1], 0.5),
    ([2, 1, 0, 5], [1, 1, 1, 0], 0.625), ([0.1 + 0.2], [0.3], 1.0)])
def test_a_tie_counts_half(new, old, rate):
    assert win_rate(new, old) == rate
    assert win_rate(old, new) == 1 - rate

def test_a_policys_gold_is_the_mean_over_both_answers_to_each_test_prompt(tmp_path, monkeypatch):
    golds = {"base": [[1, 2], [3, 5]], "round 1": [[2, 2], [3, 5]]}  # of two answers to each of two prompts

    def test_answers(o, policy, path, label):
        write_jsonl(path, [dict(prompt=prompt, score=i - value, gold=value, tokens=i + 1, finished=True)
                           for prompt, two in zip("pq", golds[label]) for i, value in enumerate(two)])
        return path
    monkeypatch.setattr(gold, "test_answers", test_answers)
    monkeypatch.setattr(gold, "score_again", lambda o, answers, rm, path: answers)
    monkeypatch.setattr(gold.toy, "parts_of_gold", lambda row: (row["gold"] - 1, 1))
    (tmp_path / "round1/e1/policy").mkdir(parents=True)
    gold.measure(mt.Options(out=str(tmp_path), policy="base", rm="rm"))
    found = [[row[key] for key in ("gold", "gold_se", "form", "content", "n", "win_rate")]
             for row in read_jsonl(tmp_path / "gold.jsonl")]
    assert found == [pytest.approx(line) for line in (
        [2.75, 1.25, 1.75, 1, 2, 0.5], [3.0, 1.0, 2.0, 1, 2, (1 + 3 / 2) / 4])]
    assert wins(*golds.values()).tolist() == [[0, 0.5], [0.5, 0.5]]

def test_winrate_judges_both_policies_on_every_prompt_and_writes_their_answers(
        call, tiny, written, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = written("prompts.jsonl", [{"prompt": p} for p in prompts[:10]])
    words = ["winrate", "--policy", tiny(seed=1), "--baseline", tiny(), "--rm", tiny(reward=True),
             "--prompts", path, "--max_new_tokens", 8]
    call(eval_script, *words)
    call(eval_script, *words, "--json", "out.json")  # the run is finished, and now only writes its figures
    figures, said = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    rows = [read_jsonl(tmp_path / "runs" / "winrate" / f"{side}.jsonl") for side in ("policy", "baseline")]
    assert [[row["prompt"] for row in side] for side in rows] == [prompts[:10]] * 2
    scores = [[row["score"] for row in side] for side in rows]
    assert figures["win_rate"] == win_rate(*scores)
    assert (figures["ci_low"], figures["ci_high"]) == wilson(figures["win_rate"], 10)
    assert said.count(f"10 prompts, win rate {win_rate(*scores):.4f}") == 2
    for side, answers, own in zip(("policy", "baseline"), rows, scores):
        assert f"{np.mean(own):.4f} ± {np.std(own, ddof=1) / 10**0.5:.4f}" in said
        assert figures[side]["characters"] == np.mean([len(row["response"]) for row in answers])
        assert figures[side]["tokens"] == np.mean([row["tokens"] for row in answers])
    lengths = [np.array([len(row["response"]) for row in side]) for side in rows]
    assert figures["similar_length"]["n"] == similar(*lengths).sum()

@pytest.mark.parametrize("flag, model, message", [
    ("--rm", "policy", "has no reward head"), ("--baseline", "rm", "reward model, but a policy is needed"),
    ("--baseline", "short", "no prompt fits into its context of 16 tokens"),
    ("--policy", "short", "no prompt fits into its context of 16 tokens")])
def test_winrate_checks_models_and_prompts_before_it_samples(
        call, tiny, written, tmp_path, flag, model, message):
    models = dict(policy=tiny(), rm=tiny(reward=True), short=tiny(max_position_embeddings=16))
    path = written("p.jsonl", [{"prompt": "sad " * 30}])
    with pytest.raises(Problem, match=message):
        call(eval_script, "winrate", "--policy", tiny(), "--baseline", tiny(), "--rm", tiny(reward=True),
             "--out", tmp_path / "out", "--prompts", path, "--max_new_tokens", 8, flag, models[model])
    assert not (tmp_path / "out").exists()

def test_accuracy_is_the_share_of_pairs_that_the_model_orders_correctly(call, tiny, written, pairs, capsys):
    shares = []
    for sides in (("chosen", "rejected"), ("rejected", "chosen")):
        rows = [dict(prompt=p["prompt"], chosen=p[sides[0]], rejected=p[sides[1]]) for p in pairs[:20]]
        call(eval_script, "accuracy", "--rm", tiny(reward=True), "--pairs", written("pairs.jsonl", rows))
        said = capsys.readouterr().out
        assert "on 20 pairs" in said
        shares.append(float(said.split()[1]))
    assert sum(shares) == pytest.approx(1) and shares[0] not in (0, 1)

def test_accuracy_is_given_by_subset_and_written_as_valid_json_even_without_similar_lengths(
        call, tiny, written, pairs, tmp_path):
    rows = [dict(prompt=p["prompt"], chosen=p["chosen"], rejected="no .", subset="ab"[i % 2])
            for i, p in enumerate(pairs[:20])]
    call(eval_script, "accuracy", "--rm", tiny(reward=True), "--pairs", written("pairs.jsonl", rows),
         "--json", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert figures["similar_length"] == dict(accuracy=None, ci_low=None, ci_high=None, n=0)
    assert figures["accuracy"] == pytest.approx(np.mean([figures["subsets"][s]["accuracy"] for s in "ab"]))
    assert (figures["ci_low"], figures["ci_high"]) == wilson(figures["accuracy"], figures["n"])

@pytest.mark.parametrize("words, message", [
    ([], "name a command"), (["judge"], "name a command"), (["report", "nowhere"], "not a run folder"),
    (["agreement", "--run", "nowhere"], "not a run folder"), *((["agreement", *w.split()], "together")
     for w in ("--run x --prompts p", "--run x --write w", "--run x --prompts p --write w --verdicts v")),
    (["alpaca", "--annotations", "nowhere.json", "--gamed", "HERE"], "github.com/tatsu-lab/alpaca_eval"),
    (["alpaca", "--annotations", "HERE", "--gamed", "nowhere.json"], "huggingface.co/datasets/tatsu-lab"),
    (["alpaca-generate", "--policy", "x", "--prompts", "nowhere.json"], "alpaca_eval.json"),
    (["arena", "--judgments", "nowhere.json"], "arena-hard-browser"),
    (["arena-generate", "--policy", "x", "--prompts", "nowhere.json"], "question.jsonl"),
    (["rewardbench", "--rm", "x", "--data", "nowhere.json"], "huggingface.co/datasets/allenai/reward-bench")])
def test_a_bad_command_line_is_refused_and_a_missing_file_is_named_with_where_it_is_published(
        call, tmp_path, words, message):
    columns = dict(model="m", baseline="b", preference=[1.0], len_output=[1], len_baseline=[1])
    (tmp_path / "here.json").write_text(json.dumps(columns))
    with pytest.raises(Problem, match=message) as error:
        call(eval_script, *(tmp_path / "here.json" if word == "HERE" else word for word in words))
    assert "\n" not in str(error.value)
    assert ("nowhere.json" in words) == str(error.value).startswith("nowhere.json: no such file")

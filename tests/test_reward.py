"""pytest tests/test_reward.py

A reward is the logit at the last token of the chat, as plain transformers gives it, whatever else is in the
batch. A reward that is not finite is refused.
"""
from collections import Counter

import pytest
import torch
from conftest import with_weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import reward
from common.data import load_tokenizer, read_jsonl
from common.models import load_reward
from common.parallel import Problem
from evals.rewardbench import judge_pairs
from reward import Rewards, score_answers

@pytest.fixture(scope="module")
def questions(pairs):
    """[(prompt, [answers])] with one to three answers of different length."""
    return [(p["prompt"], [p["chosen"], p["rejected"], "the end ."][:number % 3 + 1])
            for number, p in enumerate(pairs[:10])]

def scores(folder, questions, batch=4):
    return score_answers(Rewards(load_reward(folder)), load_tokenizer(folder), questions, batch)

@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_a_reward_is_the_logit_that_transformers_gives_to_the_chat_alone(tiny, questions, kind):
    folder = tiny(kind, reward=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alone = []
    for prompt, answers in questions:
        chats = [[dict(role="user", content=prompt), dict(role="assistant", content=answer)]
                 for answer in answers]
        ids = [tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in chats]
        logits = [model(one["input_ids"]).logits[0, 0].item() for one in ids]
        alone.append(pytest.approx(logits, rel=1e-5, abs=1e-5))
    for batch in (1, 3, 100):  # whatever else is in the batch
        assert scores(folder, questions, batch) == alone
        assert scores(folder, questions[::-1], batch) == alone[::-1]

# ---------------------------------------------------------------- heads, and rewards that are refused
@pytest.fixture
def samples(written, questions):
    return written("samples.jsonl", [dict(prompt=prompt, response=answer, tokens=3, finished=True)
                                     for prompt, answers in questions for answer in answers])

def test_training_gives_a_causal_lm_a_fresh_reward_head_and_says_so(
        tiny, call, written, pairs, samples, tmp_path, capsys):
    call(reward, "--model", tiny(), "--pairs", written("pairs.jsonl", pairs[:20]), "--out", tmp_path / "rm",
         "--lr", 1e-3, "--batch", 5)
    said = capsys.readouterr().out
    assert f"{tiny()} is a LlamaForCausalLM without a reward head, so training starts with a new one" in said
    made = load_reward(tmp_path / "rm")  # it has a head now, so that loading succeeds
    assert made.config.num_labels == 1 and made.config.architectures == ["LlamaForSequenceClassification"]
    values = scores(tmp_path / "rm", [(p["prompt"], [p["chosen"], p["rejected"]]) for p in pairs[20:30]])
    kept, right = judge_pairs(str(tmp_path / "rm"), pairs[20:30], 4, 1000)
    assert kept == pairs[20:30] and right.tolist() == [a > b for a, b in values]
    call(reward, "--model", tmp_path / "rm", "--samples", samples, "--out", tmp_path / "scored.jsonl")
    rows = read_jsonl(tmp_path / "scored.jsonl")
    assert [{k: v for k, v in row.items() if k not in ("score", "rm")} for row in rows] == read_jsonl(samples)

def test_a_judge_sees_the_rewards_of_a_prompts_answers_and_its_scores_replace_them(tiny, samples, tmp_path):
    def judge(prompt, rows):
        assert {row["prompt"] for row in rows} == {prompt}
        return [len(rows) - row["score"] for row in rows]

    judged, rows = tmp_path / "judged.jsonl", read_jsonl(samples)
    reward.score(tiny(reward=True), rows, tmp_path / "plain.jsonl", 4)
    reward.score(tiny(reward=True), rows, judged, 4, judge)
    count = Counter(row["prompt"] for row in rows)
    assert read_jsonl(judged) == [row | {"score": count[row["prompt"]] - row["score"]}
                                  for row in read_jsonl(tmp_path / "plain.jsonl")]
    with pytest.raises(ValueError):  # too few scores
        reward.score(tiny(reward=True), rows, judged, 4, lambda prompt, rows: rows[1:])

def test_a_pair_with_equal_rewards_counts_as_wrong(tiny, tmp_path, pairs):
    folder = with_weights(tiny(reward=True), tmp_path / "rm",
                          lambda weights: weights | {"score.weight": torch.zeros(1, 32)})
    assert judge_pairs(folder, pairs[:10], 4, 1000)[1].tolist() == [False] * 10

def test_a_reward_that_is_not_finite_is_refused_with_its_prompt(tiny, questions):
    model = Rewards(load_reward(tiny(reward=True)))
    score_answers(model, load_tokenizer(tiny(reward=True)), questions, 4)
    model.model.score.weight.data[0, 3] = float("nan")
    names = "|".join(prompt[:20] for prompt, _ in questions)
    with pytest.raises(Problem, match=f"gives the rewards .*nan.* to the answers to '({names})"):
        score_answers(model, load_tokenizer(tiny(reward=True)), questions, 4)

"""pytest tests/test_reward.py

A reward is the raw logit at the last real token, whatever stands beside it in the batch.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mt
import reward
from common.data import load_tokenizer, read_jsonl
from common.models import load_reward
from common.parallel import Problem
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
    for (prompt, answers), values in zip(questions, scores(folder, questions), strict=True):
        for answer, value in zip(answers, values, strict=True):
            chat = [dict(role="user", content=prompt), dict(role="assistant", content=answer)]
            ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]
            assert value == pytest.approx(model(ids).logits[0, 0].item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_reward_does_not_depend_on_padding_batch_or_the_other_answers(tiny, questions, kind):
    model = Rewards(load_reward(tiny(kind, reward=True)))
    tokenizer = load_tokenizer(tiny(kind, reward=True))
    alone = [[score_answers(model, tokenizer, [(prompt, [answer])], 1)[0][0] for answer in answers]
             for prompt, answers in questions]
    for order, expected in ((questions, alone), (questions[::-1], alone[::-1])):
        for batch in (1, 3, 100):
            values = score_answers(model, tokenizer, order, batch)
            assert sum(values, []) == pytest.approx(sum(expected, []), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_the_pad_token_changes_no_reward(tiny, questions, tmp_path, pad):
    original = tiny(reward=True)
    folder = Path(shutil.copytree(original, tmp_path / "rm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 2 if pad else None}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token == pad
    assert scores(folder, questions) == scores(original, questions)


# ---------------------------------------------------------------- what is no reward model
@pytest.fixture
def samples(written, questions):
    return written("samples.jsonl", [dict(prompt=prompt, response=answer, tokens=3, finished=True)
                                     for prompt, answers in questions for answer in answers])


def without_head(tiny, folder):
    shutil.copytree(tiny(reward=True), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("make, message", [
    (lambda tiny, _: tiny(), "LlamaForCausalLM has no reward head"),
    (lambda tiny, _: tiny(reward=True, num_labels=2), "has 2 labels"),
    (without_head, "weights are missing: score.weight"),
])
def test_a_model_without_a_head_of_one_label_is_refused(
        tiny, call, written, samples, prompts, tmp_path, make, message):
    folder = make(tiny, tmp_path / "rm")
    with pytest.raises(Problem, match=message):
        call(reward, "--model", folder, "--samples", samples, "--out", tmp_path / "scored.jsonl")
    with pytest.raises(Problem, match=message):
        call(mt, "--policy", tiny(), "--rm", folder, "--out", tmp_path / "run", "--select_prompts", 6,
             "--prompts", written("prompts.jsonl", [{"prompt": p} for p in prompts]), "--max_new_tokens", 2)


def test_training_gives_a_causal_lm_a_fresh_head_says_so_and_reports_accuracy(
        tiny, call, written, pairs, samples, tmp_path, capsys):
    call(reward, "--model", tiny(), "--pairs", written("pairs.jsonl", pairs[:20]), "--out", tmp_path / "rm",
         "--test", written("test.jsonl", pairs[20:30]), "--lr", 1e-3, "--batch", 5)
    said = capsys.readouterr().out
    assert "LlamaForCausalLM: training starts with a fresh reward head" in said
    made = load_reward(tmp_path / "rm")  # with a head now: nothing is missing
    assert made.config.num_labels == 1 and made.config.architectures == ["LlamaForSequenceClassification"]
    values = scores(tmp_path / "rm", [(p["prompt"], [p["chosen"], p["rejected"]]) for p in pairs[20:30]])
    assert f": {sum(a > b for a, b in values) / 10:.4f} of 10 pairs" in said
    call(reward, "--model", tmp_path / "rm", "--samples", samples, "--out", tmp_path / "scored.jsonl")
    rows = read_jsonl(tmp_path / "scored.jsonl")
    assert [{k: v for k, v in row.items() if k not in ("score", "rm")} for row in rows] == read_jsonl(samples)


def test_equal_rewards_are_no_success(tiny, tmp_path, pairs):
    folder = Path(shutil.copytree(tiny(reward=True), tmp_path / "rm"))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.weight": torch.zeros(1, 32)}, folder / "model.safetensors", {"format": "pt"})
    assert reward.ordered(folder, pairs[:10], 4) == [False] * 10


def test_a_reward_that_is_not_finite_is_named_by_its_prompt(tiny, questions):
    model = Rewards(load_reward(tiny(reward=True)))
    score_answers(model, load_tokenizer(tiny(reward=True)), questions, 4)
    model.model.score.weight.data[0, 3] = float("nan")
    with pytest.raises(Problem, match=f"gives the rewards .*nan.* to the answers to '{questions[0][0][:20]}"):
        score_answers(model, load_tokenizer(tiny(reward=True)), questions, 4)


def test_a_reward_model_with_damaged_weights_scores_nothing(call, samples, tmp_path, without_numbers):
    with pytest.raises(Problem, match="nan: damaged weights: NaN or infinite numbers in score.weight"):
        call(reward, "--model", without_numbers, "--samples", samples, "--out", tmp_path / "scored.jsonl")
    assert not (tmp_path / "scored.jsonl").exists()


@pytest.mark.parametrize("row, message", [
    (dict(prompt="a"), ":2: no response"), (dict(prompt="a", response=None), ":2: no response"),
    (dict(response="a"), ":2: no prompt"), (dict(prompt=5, response="a"), ":2: no prompt"),
])
def test_a_bad_sample_is_named_by_its_line(tiny, call, written, tmp_path, row, message):
    path = written("samples.jsonl", [dict(prompt="a", response="b"), row])
    with pytest.raises(Problem, match=message):
        call(reward, "--model", tiny(reward=True), "--samples", path, "--out", tmp_path / "scored.jsonl")

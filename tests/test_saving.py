"""pytest tests/test_saving.py

What is saved is what was trained, and what the files of a folder hold decides what its model is.
"""
import json
from pathlib import Path

import pytest
import torch
from conftest import forked, with_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dpo
from common import models
from common.models import load_policy, load_reward
from common.parallel import Problem
from dpo import ResponseLogps

def change_config(folder, **changes):
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return str(folder)

def test_a_bf16_policy_keeps_on_a_cpu_what_it_has_learnt(tiny, call, written, pairs, tmp_path, capsys):
    bf16 = change_config(with_weights(tiny(), tmp_path / "bf16", lambda weights: {
        name: weight.bfloat16() for name, weight in weights.items()}), dtype="bfloat16")
    call(dpo, "--model", bf16, "--pairs", written("pairs.jsonl", pairs[:8]), "--out", tmp_path / "out",
         "--lr", 1e-6)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (bf16, tmp_path / "out"))
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    changes = torch.cat([(after[name] - before[name].float()).flatten() for name in before])
    assert 0 < changes.abs().max() < 2e-6  # a step of AdamW, of which bf16 would keep nothing
    share = (changes != 0).float().mean()
    assert share > 0.5
    assert f"{share:.1%} of the weights differ from those in {bf16}\n" in capsys.readouterr().out

def test_a_warning_says_if_the_saved_folder_has_lost_the_update(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "precision", lambda: torch.bfloat16)  # as on GPUs
    monkeypatch.setattr(models, "READ_BACK", {tiny()})
    for size, said in ((1e-8, "; WARNING: NEXT TO NOTHING"), (1e-2, "")):
        policy = load_policy(tiny(), training=True)
        for weight in policy.parameters():
            weight.data += size
        models.save(ResponseLogps(policy), tiny(), tmp_path / "out")
        [line] = capsys.readouterr().out.splitlines()
        assert ("WARNING" in line) == bool(said) and said in line

@pytest.mark.parametrize("processes", [1, 2])
def test_a_head_that_the_config_calls_tied_is_trained_and_saved_as_a_head(
        tiny, written, pairs, tmp_path, processes):
    untied = change_config(with_weights(tiny(), tmp_path / "untied", dict), tie_word_embeddings=True)
    words = ["--model", untied, "--pairs", written("pairs.jsonl", pairs[:8]), "--lr", 1e-3]
    forked("dpo", [*map(str, words), "--out", str(tmp_path / "out")], processes)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])

def test_the_first_save_from_a_folder_is_read_again(tiny, tmp_path, monkeypatch):
    def lose(weights, *arguments, **options):
        weights["model.norm.weight"] = 2 * weights["model.norm.weight"]
        return write(weights, *arguments, **options)
    write, policy = models.save_torch_state_dict, ResponseLogps(load_policy(tiny()))
    monkeypatch.setattr(models, "READ_BACK", set())
    monkeypatch.setattr(models, "save_torch_state_dict", lose)
    with pytest.raises(Problem, match="model.norm.weight is not the same when it is loaded again"):
        models.save(policy, tiny(), tmp_path / "out")

# ---------------------------------------------------------------- what a folder's model is
@pytest.mark.parametrize("changes", [
    dict(num_labels=None, id2label=None, label2id=None), dict(num_labels=3), dict(architectures=None),
    dict(architectures=["LlamaForCausalLM"]), dict(architectures=["RewardModel"])])
def test_one_row_of_score_weight_is_a_reward_model_whatever_the_config_says(
        tiny, tmp_path, changes, capsys):
    expected = load_reward(tiny(reward=True)).score.weight
    folder = change_config(with_weights(tiny(reward=True), tmp_path / "rm", dict), **changes)
    for fresh_head in (False, True):  # by True only a model without a head gets one
        assert torch.equal(load_reward(folder, fresh_head=fresh_head).score.weight, expected)
    assert capsys.readouterr().out == ""
    with pytest.raises(Problem, match="is a reward model, but a policy is needed"):
        load_policy(folder)

@pytest.mark.parametrize("head, message", [
    ({"score.weight": torch.ones(3, 32)}, "a reward head has one label and no bias; this one has 3 labels"),
    ({"score.bias": torch.ones(1)}, "this one has 1 labels and a bias"),
    ({"score.weight": None, "v_head.weight": torch.ones(1, 32)}, "has no reward head .score.weight in saf")])
def test_other_heads_are_refused(tiny, tmp_path, head, message):
    folder = with_weights(tiny(reward=True), tmp_path / "rm", lambda weights: {
        name: weight for name, weight in (weights | head).items() if weight is not None})
    with pytest.raises(Problem, match=message):
        load_reward(folder)

def test_weights_that_the_model_does_not_take_are_refused_and_files_that_it_does_not_read_are_ignored(
        tiny, tmp_path):
    folder = with_weights(tiny(), tmp_path / "lora", lambda them: them | {"lora_A.weight": torch.ones(3)})
    with pytest.raises(Problem, match="its files have weights that it does not take: lora_A.weight"):
        load_policy(folder)
    folder = with_weights(tiny(), tmp_path / "stale", dict)
    save_file({"score.weight": torch.ones(1, 32)}, folder / "consolidated.safetensors")
    assert load_policy(folder)

"""pytest tests/test_models.py

Each family of transformers' decoders is built tiny and random. Either its samples, log-probabilities,
gradients, rewards and saved weights are those of plain transformers, or it is refused in one line.
docs/models.md has the table.
"""
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import forked, with_weights
from safetensors.torch import load_file
from test_sampler import STOPS, generate_reference
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

import dpo
import reward
import sampler
from common import data, models, packing, toy
from common.models import load_policy, load_reward
from common.packing import Row, collate
from common.parallel import Problem
from dpo import ResponseLogps
from reward import Rewards

SHAPE = dict(
    vocab_size=len(toy.tokenizer()), pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=32,
    intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=96, num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_k=2, moe_topk=2, moe_intermediate_size=16, n_embd=32, n_layer=2, n_head=4,
    n_positions=96, n_inner=64, ffn_dim=64, word_embed_proj_dim=32)
WINDOW = dict(sliding_window=8)  # shorter than the chats
MIXED = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
LATENT = dict(head_dim=8, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
              qk_head_dim=16, v_head_dim=12, num_key_value_heads=4)
LATENT_MOE = LATENT | dict(n_group=1, topk_group=1, first_k_dense_replace=1)
LONGROPE = dict(original_max_position_embeddings=48, rope_parameters=dict(
    rope_type="longrope", rope_theta=1e4, factor=2.0, short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 2.0, 3.0, 4.0]))
CHUNKS = dict(attention_chunk_size=48, layer_types=["chunked_attention", "full_attention"])
SSM = dict(mamba_n_heads=4, mamba_d_ssm=64, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16)
DECODER = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64)

PLAIN = ("llama", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "glm", "glm4", "smollm3", "helium", "arcee",
         "apertus", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "jais2", "bitnet", "persimmon", "gpt_neox",
         "gpt2", "gpt_bigcode", "opt", "biogpt", "phi", "nanochat", "modernbert-decoder", "qwen3_moe",
         "olmoe", "flex_olmo", "granitemoe", "phimoe", "jetmoe", "ernie4_5_moe", "minimax_m2", "glm4_moe",
         "hunyuan_v1_moe", "diffllama", "hrm_text")
EQUAL = dict.fromkeys(PLAIN, {}) | {  # family: what its config has besides SHAPE
    "mistral": WINDOW, "ministral3": WINDOW, "starcoder2": WINDOW, "mixtral": WINDOW, "ministral": MIXED,
    "gemma3_text": MIXED, "olmo3": MIXED, "exaone4": MIXED, "cwm": MIXED,
    "cohere2": MIXED | dict(logit_scale=0.3), "cohere": dict(logit_scale=0.3), "phi3": LONGROPE,
    "granite": dict(logits_scaling=4.0, attention_multiplier=0.3), "hyperclovax": dict(logits_scaling=3.0),
    "ctrl": dict(dff=64), "qwen2_moe": dict(shared_expert_intermediate_size=16), "llama4_text": CHUNKS,
    "deepseek_v2": LATENT_MOE, "deepseek_v3": LATENT_MOE, "glm4_moe_lite": LATENT_MOE, "youtu": LATENT,
    "minicpm3": LATENT, "longcat_flash": LATENT | dict(
        num_layers=1, ffn_hidden_size=32, expert_ffn_hidden_size=16, zero_expert_num=2),
    "dots1": dict(n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1), "solar_open": {},
    "exaone_moe": MIXED, "gemma4_text": MIXED | dict(
        num_kv_shared_layers=0, hidden_size_per_layer_input=0, global_head_dim=8),
    "gemma3n_text": MIXED | dict(
        num_kv_shared_layers=0, hidden_size_per_layer_input=8, vocab_size_per_layer_input=SHAPE["vocab_size"],
        laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0]),
}
RM = dict(auto=AutoModelForSequenceClassification, num_labels=1)
OTHER_HEADS = ("ctrl", "modernbert-decoder")  # their policies are equal, their reward models refused
NO_SDPA = "does not support an attention implementation"
UNTOLD = "packed attention: its attention does not get the chats that share a sequence"
LEAKS = "packed attention: off by"
REFUSED = {  # family: what its config has besides SHAPE, and a part of the message
    "gemma2": ({}, NO_SDPA), "gpt_oss": ({}, NO_SDPA), "gptj": ({}, NO_SDPA), "bloom": ({}, NO_SDPA),
    "mpt": ({}, NO_SDPA), "mamba": ({}, NO_SDPA), "vaultgemma": ({}, NO_SDPA),
    "gpt_neo": (dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]), NO_SDPA),
    "deepseek_v32": (LATENT_MOE, "packed attention: "),
    "falcon": ({}, "packed attention: "), "doge": ({}, "packed attention: "), "stablelm": ({}, UNTOLD),
    "nemotron": ({}, UNTOLD), "inkling_text": ({}, "packed attention: its attention uses position_bias"),
    "minimax": ({}, LEAKS), "jamba": (dict(use_mamba_kernels=False), LEAKS), "falcon_h1": (SSM, LEAKS),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), LEAKS), "qwen3_next": ({}, LEAKS),
    "nemotron_h": ({}, LEAKS), "recurrent_gemma": ({}, "no max_position_embeddings"),
    "bart": (DECODER, "packed attention: "), "mbart": (DECODER, "packed attention: "),
}

def config_of(kind, changes, **more):
    config = CONFIG_MAPPING[kind]
    known = {*inspect.signature(config.__init__).parameters, *getattr(config, "attribute_map", {})}
    always = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    return config(**{k: v for k, v in SHAPE.items() if k in known or k in always} | changes | more)

def build(kind, changes, folder, auto=AutoModelForCausalLM, noise=0.1, **more):
    """Save a tiny random model in the folder; returns the folder."""
    torch.manual_seed(0)
    model = auto.from_config(config_of(kind, changes, **more)).eval()
    assert sum(p.numel() for p in model.parameters()) < 2e6
    for weight in model.parameters():  # so large that tokens, positions and biases change the result
        weight.data.add_(torch.randn_like(weight), alpha=noise)
    model.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="module")
def rows():
    """A pair of answers to one prompt, a lone answer and a long one."""
    rng = np.random.default_rng(1)
    return [Row(*([rng.integers(3, 100, n).tolist() for n in some] if isinstance(some, tuple) else
                  rng.integers(3, 100, some).tolist() for some in (trunk, branches)))
            for trunk, branches in ((9, (4, 12)), (2, (7,)), (20, (10,)))]

def chats_of(rows):
    """[(tokens of an answer with its prompt, index of its first token)]"""
    return [(row.trunk + branch, len(row.trunk)) for row in rows for branch in row.branches]

def assert_same_gradients(ours, theirs):
    expected, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        if weight.grad is not None and weight.grad.abs().max() > 0:
            error = (got[name].grad - weight.grad).norm() / weight.grad.norm()
            assert error < 1e-3 or weight.grad.norm() < 1e-5, (name, error)

def check_sampling(model, usual):
    """model: as the project loads it; usual: the same model as transformers loads it."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 100, n).tolist() for n in (5, 21, 1)]
    keys = rng.integers(0, 2**64, (3, 2), np.uint64)
    settings = dict(stop_ids=STOPS, temperature=1.0, top_p=0.95, max_new_tokens=10)
    usual.context = model.context
    assert sampler.generate(model, prompts, keys, rows=4, **settings) == generate_reference(
        usual, prompts, keys, **settings)

def check_values_and_gradients(ours, theirs, model, usual):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for values in (ours, theirs):
        (values * torch.linspace(-1, 2, len(values))).sum().backward()
    assert_same_gradients(model, usual)

def check_logps(model, usual, rows):
    def alone(ids, start):
        logits = usual(torch.tensor([ids]), use_cache=False).logits[0, start - 1:-1]
        return -F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum")

    theirs = torch.stack([alone(*chat) for chat in chats_of(rows)])
    check_values_and_gradients(ResponseLogps(model)(collate(rows)), theirs, model, usual)

def check_rewards(folder, rows):
    usual, model = AutoModelForSequenceClassification.from_pretrained(folder).eval(), load_reward(folder)
    theirs = torch.stack([usual(torch.tensor([ids])).logits[0, 0] for ids, _ in chats_of(rows)])
    check_values_and_gradients(Rewards(model)(collate(rows)), theirs, model, usual)

def check_saving(model, usual, source, folder):
    usual.save_pretrained(folder / "expected")
    models.save(ResponseLogps(model), source, folder / "saved")
    expected, got = (load_file(folder / name / "model.safetensors") for name in ("expected", "saved"))
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, got[name]), name
    load_policy(folder / "saved")

@pytest.mark.parametrize("kind", EQUAL)
def test_a_family_is_equal_to_plain_transformers(kind, rows, tmp_path):
    folder = build(kind, EQUAL[kind], tmp_path / "policy")
    usual, model = AutoModelForCausalLM.from_pretrained(folder).eval(), load_policy(folder)
    check_sampling(model, usual)
    check_logps(model, usual, rows)
    check_saving(model, usual, folder, tmp_path)

@pytest.mark.parametrize("kind", [kind for kind in EQUAL if kind in CLASSIFIERS])
def test_a_familys_reward_models_are_equal_to_plain_transformers_or_refused(kind, rows, tmp_path):
    folder = build(kind, EQUAL[kind], tmp_path / "rm", **RM)
    if kind in OTHER_HEADS:
        with pytest.raises(Problem, match="no reward head .score.weight.|no linear head `score`"):
            load_reward(folder)
    else:
        check_rewards(folder, rows)

@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_is_refused_in_one_line(kind, tmp_path):
    changes, message = REFUSED[kind]
    folder = build(kind, changes, tmp_path / "policy")
    with pytest.raises(Problem, match=message) as refusal:
        sampler.verify(load_policy(folder))
    assert "\n" not in str(refusal.value)

# ---------------------------------------------------------------- the check at a model's first use
def without_chats(query, options):
    """Let each token of a packed sequence see all tokens before it, of other chats, too."""
    tokens = torch.arange(query.shape[2])
    options.update(chats=[tokens[None]], places=tokens)
    return query

def without_window(query, options):
    options["sliding_window"] = None
    return query

def with_another_scale(query, options):
    return 1.1 * query

@pytest.mark.parametrize("mistake, part, deviation", [
    (without_chats, "packed attention", 0.002), (without_window, "packed attention", 0.002),
    (without_window, "the sampler's cache", 0.002), (with_another_scale, "the sampler's cache", 0.1)])
def test_a_mistake_in_attention_is_noticed_even_if_weights_are_small_and_windows_long(
        monkeypatch, tmp_path, mistake, part, deviation):
    def mistaken(module, query, key, value, mask, **options):
        if ("attend" in options) == (part == "the sampler's cache"):
            query = mistake(query, options)
        return packing.attention(module, query, key, value, mask, **options)

    folder = build("mistral", dict(sliding_window=64, initializer_range=deviation), tmp_path, noise=0)
    sampler.verify(load_policy(folder))
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", mistaken)
    with pytest.raises(Problem, match=f"mistral models are not supported: {part}: off by "):
        sampler.verify(load_policy(folder))

@pytest.mark.parametrize("name, index, value", [
    ("model.embed_tokens.weight", (0, 0), "nan"), ("model.layers.1.mlp.up_proj.weight", (3, 5), "inf"),
    ("lm_head.weight", (99, 0), "nan")])
def test_weights_that_are_not_finite_are_named(tiny, tmp_path, name, index, value):
    def damage(weights):
        weights[name][index] = float(value)
        return weights
    folder = with_weights(tiny(), tmp_path / "damaged", damage)
    for use in (sampler.verify, lambda model: ResponseLogps(model)(collate([Row([5], [[6]])]))):
        with pytest.raises(Problem, match=f"damaged: damaged weights: NaN or infinite numbers in {name}"):
            use(load_policy(folder))

@pytest.mark.parametrize("kind, context", [
    ("phi3", 48), ("llama4_text", 48), ("mistral", 96), ("gemma3_text", 96)])
def test_the_context_ends_where_longrope_or_chunks_begin_to_matter_and_not_at_a_sliding_window(
        kind, context, tmp_path):
    build(kind, EQUAL[kind], tmp_path)
    assert load_policy(tmp_path).context == context == models.context_of(tmp_path)

# ---------------------------------------------------------------- two processes
@pytest.mark.filterwarnings("error:.*view")  # FSDP warns about views
@pytest.mark.parametrize("module, kind", [(dpo, "granite"), (reward, "qwen3_moe")])
def test_two_processes_train_a_scaled_head_or_experts_as_one_process_does(
        call, written, pairs, tmp_path, module, kind):
    folder = build(kind, EQUAL[kind], tmp_path / "model", **(RM if module is reward else {}))
    words = ["--model", folder, "--pairs", written("pairs.jsonl", pairs[:8]), "--batch", 4, "--lr", 1e-3]
    call(module, *words, "--out", tmp_path / "one")
    forked(module.__name__, [*map(str, words), "--out", str(tmp_path / "two")], 2)
    one, two = ([row["loss"] for row in data.read_jsonl(tmp_path / out / "metrics.jsonl") if "loss" in row]
                for out in ("one", "two"))
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-5)
    names, expected = (load_file(tmp_path / name / "model.safetensors").keys() for name in ("two", "model"))
    assert names == expected  # they are named as on the hub
    assert kind == "granite" or "model.layers.0.mlp.experts.3.up_proj.weight" in names

def test_docs_models_md_lists_the_families_that_are_tested_here():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    for families, heading in ((EQUAL, "Equal"), (REFUSED, "Refused")):
        table = text.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert set(re.findall(r"`([\w-]+)`", "".join(
            line.split("|")[2] for line in table.splitlines() if line.startswith("| ")))) == {*families}

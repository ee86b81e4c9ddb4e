"""pytest tests/test_sampler.py

`generate_reference` defines sampling, slowly and obviously; the fast sampler gives the same tokens. Draws
follow the distribution that they should, blocks are well sized, and the cache fits into the memory.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sampler
from common import models
from common.data import encode_chat, load_tokenizer, prompt_id, read_jsonl, seed_of
from common.models import load_policy
from common.parallel import Problem
from sampler import TRIES, block_size, draw, generate, mass_above, nucleus, stop_tokens, uniform

STOPS = [2, *range(30, 38)]  # about one token in twelve ends a response, so that rows often change

@pytest.fixture(scope="module")
def questions():
    """Nine token lists of 1 to 21 tokens, and a key for each of three samples."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 100, size).tolist() for size in (5, 21, 1, 8, 8, 13, 2, 17, 3)]
    return ids, rng.integers(0, 2**64, (len(ids), 3), dtype=np.uint64)

# ---------------------------------------------------------------- the definition and the fast sampler
def uniform_reference(key, counter):
    """A number in (0, 1] by splitmix64, as its paper writes it."""
    x = (key + counter * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) // 2**40 + 1) / 2**24

def test_random_numbers_are_those_of_splitmix64(rng):
    keys, counters = rng.integers(0, 2**64, 999, dtype=np.uint64), rng.integers(0, 9000, 999)
    expected = [uniform_reference(int(key), int(counter)) for key, counter in zip(keys, counters)]
    assert uniform(torch.tensor(keys.view(np.int64)), torch.tensor(counters)).tolist() == expected
    assert 0 < min(expected) and max(expected) <= 1

@torch.inference_mode()
def generate_reference(model, prompts, keys, *, stop_ids, temperature, top_p, max_new_tokens):
    """The definition of `generate`: one response at a time, and for every token the whole chat so far is
    computed again."""
    model.set_attn_implementation("sdpa")

    def next_token(prefix, key, step):
        logits = model(torch.tensor([prefix], device=model.device), use_cache=False).logits[:, -1].float()
        if temperature == 0:
            return logits.argmax().item()
        probs = (logits / temperature).softmax(-1)
        for attempt in range(TRIES + 1):
            if attempt == TRIES:
                probs = nucleus(probs, top_p)
            cumulative = probs.cumsum(-1)
            u = torch.tensor([[uniform_reference(int(key), step * (TRIES + 1) + attempt)]])
            token = torch.searchsorted(cumulative, u * cumulative[:, -1:]).item()
            if nucleus(probs, top_p)[0, token] > 0 or attempt == TRIES:
                return token

    def respond(prompt, key):
        tokens = []
        while len(tokens) < max_new_tokens and len(prompt) + len(tokens) < model.context:
            tokens.append(next_token(prompt + tokens, key, len(tokens)))
            if tokens[-1] in stop_ids:
                break
        return tokens

    return [[respond(prompt, key) for key in row] for prompt, row in zip(prompts, keys)]

@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (0.8, 0.95), (1.0, 1.0), (1.5, 0.9), (1.2, 0.05)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_gives_the_tokens_of_the_reference_however_many_rows_are_decoded_together(
        tiny, questions, kind, temperature, top_p):
    context = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    model, (prompts, keys) = load_policy(tiny(kind, **{context: 24})), questions
    settings = dict(stop_ids=STOPS, temperature=temperature, top_p=top_p, max_new_tokens=12)
    expected = generate_reference(model, prompts, keys, **settings)
    for rows in (1, 4, 64):
        assert generate(model, prompts, keys, rows=rows, **settings) == expected
    ends = {"stop" if tokens[-1] in STOPS else len(tokens) for row in expected for tokens in row}
    assert temperature == 0 or ends >= {"stop", 12, 3}  # 12: max_new_tokens; 3: the end of the context

@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_attention_scores_are_fp32_in_either_precision(device, dtype):
    keys = torch.zeros(3, 2, 8, 10, dtype=dtype, device=device)[..., :7]
    scores = sampler.fp32_product(torch.zeros(3, 2, 4, 8, dtype=dtype, device=device), keys)
    assert scores.dtype == torch.float32 and scores.shape == (3, 2, 4, 7)

# ---------------------------------------------------------------- the distribution
@pytest.mark.parametrize("temperature, top_p", [(0.8, 0.5), (0.8, 0.95), (1.0, 0.95)])
def test_the_nucleus_is_that_of_transformers(golden, temperature, top_p):
    peers = load_file(golden / "sampling_probs.safetensors")
    probs = (peers["logits"] / temperature).softmax(-1)
    theirs, ours = peers[f"probs_t{temperature}_p{top_p}_k0"], nucleus(probs, top_p)
    torch.testing.assert_close(ours[:5], theirs[:5], rtol=1e-5, atol=1e-7)
    # row 5 has a tie, of which any token may be kept, so that only the mass that is kept can be compared
    torch.testing.assert_close(*((probs * (kept > 0)).sum(-1) for kept in (ours, theirs)))

def spread(rows=6, vocabulary=200, ties=True):
    """(rows, vocabulary) logits from nearly flat to peaked, with many exact ties."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    return (logits * 4).round() / 4 * torch.linspace(0.2, 4, rows)[:, None] if ties else logits * 2

@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.95])
def test_a_draw_is_accepted_exactly_if_it_lies_in_the_nucleus(top_p):
    probs = spread().softmax(-1).double()  # double precision: no sum is rounded to top_p itself
    kept = nucleus(probs, top_p) > 0
    for token in range(probs.shape[1]):
        column = torch.full((len(probs), 1), token)
        assert ((mass_above(probs, column) < top_p) == kept[:, token]).all()

@pytest.mark.parametrize("counting", ["keys", "positions"])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (1.0, 0.3), (1.0, 0.05)])
def test_draws_follow_the_distribution_of_the_nucleus(temperature, top_p, counting):
    draws = 20_000  # at top-p 0.05 most are made by sorting, after eight rejected ones
    logits = spread(1, 60, ties=False)
    expected = nucleus((logits / temperature).softmax(-1), top_p)[0].double().numpy() * draws
    keys = np.array([seed_of(0, i) for i in range(draws)], np.uint64).view(np.int64)
    keys, drawn = torch.tensor(keys), torch.zeros(draws, dtype=torch.long)
    if counting == "positions":  # many tokens of one response
        keys, drawn = keys[:1].repeat(draws), torch.arange(draws)
    tokens, listed = draw(logits.expand(draws, -1), keys, drawn, temperature, top_p)
    assert tokens.tolist() == listed
    observed = np.bincount(tokens.numpy(), minlength=60)
    assert observed[expected == 0].sum() == 0
    often = expected >= 5
    chi2, freedom = ((observed - expected)[often]**2 / expected[often]).sum(), often.sum()
    assert chi2 < freedom + 5 * (2 * freedom)**0.5
    assert draw(logits, None, None, 0, 0.9)[1] == logits.argmax(-1).tolist()  # greedy needs no key

# ---------------------------------------------------------------- the phase
def run(call, tiny, path, out, *words):
    call(sampler, "--model", tiny(), "--prompts", path, "--out", out, "--temperature", 1.0,
         "--max_new_tokens", 12, *words)
    return read_jsonl(out)

def test_samples_depend_on_the_seed_and_not_on_order_or_blocks_and_finished_means_a_stop_token(
        call, tiny, written, prompts, tmp_path):
    path = written("p.jsonl", [{"prompt": p} for p in prompts])
    rows = run(call, tiny, path, tmp_path / "a.jsonl", "--samples", 3)
    other = run(call, tiny, path, tmp_path / "other.jsonl", "--samples", 3, "--seed", 1)
    assert len({row["response"] for row in rows} & {row["response"] for row in other}) < len(rows) / 10
    assert [(row["prompt"], row["index"]) for row in rows] == [(p, i) for p in prompts for i in range(3)]
    path = written("q.jsonl", [{"prompt": p} for p in prompts[::-2]])
    fewer = run(call, tiny, path, tmp_path / "b.jsonl", "--samples", 3, "--sample_batch", 4)
    assert fewer == [row for p in prompts[::-2] for row in rows if row["prompt"] == p]

    tokenizer, model = load_tokenizer(tiny()), load_policy(tiny())
    stops = stop_tokens(tiny(), tokenizer)
    assert stops == {2, 7}  # the generation config's
    keys = np.array([[seed_of(0, prompt_id(p), i) for i in range(3)] for p in prompts[:8]], np.uint64)
    again = generate_reference(model, [encode_chat(tokenizer, p) for p in prompts[:8]], keys,
                               stop_ids=stops, temperature=1.0, top_p=0.95, max_new_tokens=12)
    for row, tokens in zip(rows, (tokens for group in again for tokens in group)):
        finished = tokens[-1] in stops
        assert row["response"] == tokenizer.decode(tokens[:-1] if finished else tokens)
        assert (row["tokens"], row["finished"]) == (len(tokens), finished)
    assert {row["finished"] for row in rows} == {True, False}

@pytest.mark.parametrize("prompts, filling", [(20000, 12.8), (20000, 51.2), (20000, 64), (19711, 13)])
def test_blocks_are_large_enough_for_busy_rows_and_2_4_or_8_processes_get_equal_shares(prompts, filling):
    size = block_size(prompts, filling)
    assert 13 * filling < size <= 28 * filling + 1  # with 13 fillings rows are idle 11% of the time
    sizes = [min(size, prompts - at) for at in range(0, prompts, size)]
    for world in (2, 4, 8):
        shares = [sum(sizes[rank::world]) for rank in range(world)]
        assert max(shares) < 1.01 * prompts / world  # so nobody waits for more than 1%
    for few, filling in ((2000, 64), (800, 51.2), (30, 4 / 3), (1, 0.2), (5, 0.01)):  # in a short phase
        assert block_size(few, filling) == max(1, int(4 * filling))
    assert [block_size(few, 12.8) for few in (50, 7)] == [25, 4]  # two processes share few prompts, too

def test_the_cache_takes_half_of_the_memory_that_the_weights_leave(tiny, monkeypatch):
    model, slots = load_policy(tiny()), sampler.Slots(3, 50, "cpu")
    slots.fill([0], next(zip(*sampler.prefill(model, [[5, 6]])))[:1])
    token = sum(keys.nbytes + values.nbytes for keys, values in slots.layers) / 150
    weights = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(sampler, "memory", lambda: weights + 2 * 1000 * int(token))
    assert sampler.cache_tokens(model) == 1000
    monkeypatch.setattr(sampler, "memory", lambda: weights // 2)
    assert sampler.cache_tokens(model) == 0

def test_less_memory_means_fewer_rows_with_the_same_responses_and_too_little_is_refused(
        call, tiny, written, prompts, tmp_path, monkeypatch):
    path, found, rows, step = written("p.jsonl", [{"prompt": prompts[0]}]), {}, [], sampler.Slots.step
    monkeypatch.setattr(sampler.Slots, "step", lambda *a: rows.append(len(a[0].rows)) or step(*a))
    for tokens in (1000, 130):
        monkeypatch.setattr(sampler, "cache_tokens", lambda _, tokens=tokens: tokens)
        found[tokens] = run(call, tiny, path, tmp_path / f"{tokens}.jsonl", "--samples", 9), max(rows)
        rows.clear()
    assert found[1000][0] == found[130][0] and (found[1000][1], found[130][1]) == (9, 4)
    monkeypatch.setattr(sampler, "cache_tokens", lambda _: 10)
    with pytest.raises(Problem, match="a prompt and response of .* tokens don't fit into memory beside"):
        run(call, tiny, path, tmp_path / "o.jsonl")
    monkeypatch.setattr(models, "memory", lambda: 1000)
    with pytest.raises(Problem, match="sampling or scoring with it takes .* can't help"):
        run(call, tiny, path, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()

"""pytest tests/test_sampler.py

The fast sampler against the slow one, token for token; its draws against their distribution.
"""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

import sampler
from common import attention, models
from common.data import encode_chat, load_tokenizer, prompt_id, read_jsonl, seed_of
from common.models import load_policy
from common.parallel import Problem
from sampler import TRIES, Slots, block_size, draw, generate, mass_above, nucleus, stop_tokens, uniform

STOPS = [2, *range(30, 38)]  # about one token in twelve ends a response: rows leave and enter all the time


@pytest.fixture(scope="module")
def questions():
    """Nine token lists of 1 to 21 tokens, and a key for each of three samples."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 100, size).tolist() for size in (5, 21, 1, 8, 8, 13, 2, 17, 3)]
    return ids, rng.integers(0, 2**64, (len(ids), 3), dtype=np.uint64)


# ---------------------------------------------------------------- the fast one and the slow one
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
    """The specification of `generate`: one response at a time,
    the whole prefix computed again for every token."""
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
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_generate_gives_the_tokens_of_the_reference(tiny, questions, kind, temperature, top_p):
    model, (prompts, keys) = load_policy(tiny(kind)), questions
    settings = dict(stop_ids=STOPS, temperature=temperature, top_p=top_p, max_new_tokens=12)
    fast = generate(model, prompts, keys, rows=4, **settings)
    assert fast == generate_reference(model, prompts, keys, **settings)
    ends = [tokens[-1] in STOPS for row in fast for tokens in row]
    assert temperature == 0 or 0 < sum(ends) < len(ends)  # some stopped, some ran to the limit


def test_long_prompts_make_fewer_rows_and_the_same_responses(tiny, questions, monkeypatch):
    model, (prompts, keys) = load_policy(tiny()), questions
    rows, step = [], sampler.Slots.step
    monkeypatch.setattr(sampler.Slots, "step", lambda *a: rows.append(a[0].rows) or step(*a))
    settings = dict(stop_ids=[2], temperature=0.8, top_p=0.9, max_new_tokens=10, rows=64)
    every = generate(model, prompts, keys, **settings)
    most = max(rows)
    rows.clear()
    monkeypatch.setattr(sampler, "cache_tokens", lambda _: 3 * (max(map(len, prompts)) + 10) + 1)
    assert generate(model, prompts, keys, **settings) == every and max(rows) == 3 < most


def test_a_response_depends_on_its_key_and_not_on_order_company_or_batch_size(tiny, questions):
    model, (prompts, keys) = load_policy(tiny()), questions
    settings = dict(stop_ids=STOPS, temperature=1.0, top_p=0.95, max_new_tokens=12)
    every = generate(model, prompts, keys, rows=64, **settings)
    for some in ([8, 3, 0, 5, 1, 7, 2, 6, 4], [4, 1], [2]):
        for batch in (1, 5):
            assert generate(model, [prompts[i] for i in some], keys[some], rows=batch, **settings) == [
                every[i] for i in some]
    one_sample = generate(model, prompts, keys[:, 1:2], rows=3, **settings)
    assert [row[0] for row in one_sample] == [row[1] for row in every]
    assert len({tuple(tokens) for row in every for tokens in row}) > 20  # and the keys do matter


def test_a_response_ends_at_any_stop_token_and_holds_it_once(tiny, questions):
    prompts, keys = questions
    responses = generate(load_policy(tiny()), prompts, keys, stop_ids=STOPS, temperature=1.0, top_p=1.0,
                         rows=4, max_new_tokens=60)
    responses = [tokens for row in responses for tokens in row]
    assert len({tokens[-1] for tokens in responses}) > 4
    for tokens in responses:
        assert not set(tokens[:-1]) & set(STOPS)
        assert tokens[-1] in STOPS or len(tokens) == 60


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_response_ends_where_the_context_ends(tiny, questions, kind):
    prompts, keys = questions
    changes = {"n_positions": 24} if kind == "gpt2" else {"max_position_embeddings": 24}
    model = load_policy(tiny(kind, **changes))
    settings = dict(stop_ids=[2], temperature=1.0, top_p=1.0, max_new_tokens=20)
    responses = generate(model, prompts, keys, rows=4, **settings)
    assert responses == generate_reference(model, prompts, keys, **settings)
    for prompt, row in zip(prompts, responses):
        for tokens in row:
            assert tokens[-1] == 2 or len(tokens) == min(20, 24 - len(prompt))


def test_greedy_tokens_are_the_peers(golden):
    peers = json.loads((golden / "generate_greedy.json").read_text())
    model, prompts = load_policy(golden / "policy"), peers["prompts"]
    keys = np.zeros((len(prompts), 1), np.uint64)
    for stop_ids, name in (([2], "greedy"), ([2, peers["extra_stop_token"]], "greedy_with_stop_padded")):
        ours = generate(model, prompts, keys, stop_ids=stop_ids, temperature=0, top_p=1.0, rows=3,
                        max_new_tokens=peers["max_new_tokens"])
        padded = [tokens + [0] * (peers["max_new_tokens"] - len(tokens)) for [tokens] in ours]
        assert padded == peers[name]


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_scores_are_fp32_in_either_precision(device, dtype):
    keys = torch.zeros(3, 2, 8, 10, dtype=dtype, device=device)[..., :7]
    scores = attention._fp32_product(torch.zeros(3, 2, 4, 8, dtype=dtype, device=device), keys)
    assert scores.dtype == torch.float32 and scores.shape == (3, 2, 4, 7)


class Waits(TorchFunctionMode):
    """Counts the calls at which the host of an accelerator waits for it: what reads a tensor's values, and
    what copies values there (an index that is a list is such a copy)."""
    READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero",
             "tensor", "as_tensor", "from_numpy", "masked_select", "unique", "equal"}
    count = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = function.__name__
        listed = name in ("__getitem__", "__setitem__") and isinstance(arguments[1], (list, np.ndarray))
        self.count += name in self.READS or listed
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_host_waits_once_for_the_tokens_of_a_step(tiny, questions, monkeypatch, kind):
    model, (prompts, keys) = load_policy(tiny(kind)), questions
    settings = dict(stop_ids=[], temperature=0.8, top_p=0.95, max_new_tokens=40)
    generate(model, prompts, keys, rows=64, **settings)  # so that the model is verified
    throws, throw = [], sampler.throw
    monkeypatch.setattr(sampler, "throw", lambda *a: throws.append(1) or throw(*a))
    with Waits() as few:
        generate(model, prompts, keys, rows=64, **settings | dict(max_new_tokens=10))
    before = len(throws)
    with Waits() as many:
        generate(model, prompts, keys, rows=64, **settings)  # 30 steps more, in which nobody comes or goes
    thrice = len(throws) - 2 * before - 30  # another throw: which rows, and its list
    assert many.count - few.count == 30 + 2 * thrice and thrice < 12


# ---------------------------------------------------------------- the distribution
def kept_mass(probs, kept):
    return (probs * (kept > 0)).sum(-1)


@pytest.mark.parametrize("temperature, top_p", [(0.8, 0.5), (0.8, 0.95), (1.0, 0.95)])
def test_the_nucleus_is_the_peers(golden, temperature, top_p):
    peers = load_file(golden / "sampling_probs.safetensors")
    probs = (peers["logits"] / temperature).softmax(-1)
    theirs, ours = peers[f"probs_t{temperature}_p{top_p}_k0"], nucleus(probs, top_p)
    torch.testing.assert_close(ours[:5], theirs[:5], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kept_mass(probs, ours), kept_mass(probs, theirs))  # row 5 has a tie at its top


def spread(rows=6, vocabulary=200, ties=True):
    """(rows, vocabulary) logits from nearly flat to peaked, with many exact ties."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    return (logits * 4).round() / 4 * torch.linspace(0.2, 4, rows)[:, None] if ties else logits * 2


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.95])
def test_a_draw_is_accepted_exactly_if_it_lies_in_the_nucleus(top_p):
    probs = spread().softmax(-1).double()  # in double precision, so that no mass is rounded to top_p itself
    kept = nucleus(probs, top_p) > 0
    for token in range(probs.shape[1]):
        column = torch.full((len(probs), 1), token)
        assert ((mass_above(probs, column) < top_p) == kept[:, token]).all()


@pytest.mark.parametrize("counting", ["keys", "positions"])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (1.0, 0.3), (1.0, 0.05)])
def test_draws_are_distributed_as_the_nucleus(temperature, top_p, counting):
    draws = 20_000  # top-p 0.05 mostly ends in the cut nucleus after eight rejected draws
    logits = spread(1, 60, ties=False)
    expected = nucleus((logits / temperature).softmax(-1), top_p)[0].double().numpy() * draws
    keys = np.array([seed_of(0, i) for i in range(draws)], np.uint64).view(np.int64)
    keys, drawn = torch.tensor(keys), torch.zeros(draws, dtype=torch.long)
    if counting == "positions":  # of one response
        keys, drawn = keys[:1].repeat(draws), torch.arange(draws)
    tokens, listed = draw(logits.expand(draws, -1), keys, drawn, temperature, top_p)
    assert tokens.tolist() == listed
    observed = np.bincount(tokens.numpy(), minlength=60)
    assert observed[expected == 0].sum() == 0
    often = expected >= 5
    chi2, freedom = ((observed - expected)[often]**2 / expected[often]).sum(), often.sum()
    assert chi2 < freedom + 5 * (2 * freedom)**0.5


def test_greedy_takes_the_likeliest_and_needs_no_key():
    logits = spread(ties=False)
    assert draw(logits, None, None, 0, 0.9)[1] == logits.argmax(-1).tolist()


# ---------------------------------------------------------------- the phase
def run(call, tiny, path, out, *words):
    call(sampler, "--model", tiny(), "--prompts", path, "--out", out, "--temperature", 1.0,
         "--max_new_tokens", 12, *words)
    return read_jsonl(out)


def test_samples_do_not_depend_on_order_and_blocks_and_finished_tells_stop_tokens(
        call, tiny, written, prompts, tmp_path):
    path = written("p.jsonl", [{"prompt": p} for p in prompts])
    rows = run(call, tiny, path, tmp_path / "a.jsonl", "--samples", 3)
    assert [(row["prompt"], row["index"]) for row in rows] == [(p, i) for p in prompts for i in range(3)]
    path = written("q.jsonl", [{"prompt": p} for p in prompts[::-2]])
    fewer = run(call, tiny, path, tmp_path / "b.jsonl", "--samples", 3, "--sample_batch", 4)
    assert fewer == [row for p in prompts[::-2] for row in rows if row["prompt"] == p]

    tokenizer, model = load_tokenizer(tiny()), load_policy(tiny())
    stops = stop_tokens(tiny(), tokenizer)
    assert stops == [2, 7]  # the generation config's
    keys = np.array([[seed_of(0, prompt_id(p), i) for i in range(3)] for p in prompts[:8]], np.uint64)
    again = generate_reference(model, [encode_chat(tokenizer, p).ids for p in prompts[:8]], keys,
                               stop_ids=stops, temperature=1.0, top_p=0.95, max_new_tokens=12)
    for row, tokens in zip(rows, (tokens for group in again for tokens in group)):
        assert row["response"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert (row["tokens"], row["finished"]) == (len(tokens), tokens[-1] in stops)
    assert {row["finished"] for row in rows} == {True, False}


@pytest.mark.parametrize("prompts, filling", [(20000, 12.8), (20000, 51.2), (20000, 64), (19711, 13)])
def test_blocks_are_large_enough_for_busy_rows_and_2_4_or_8_processes_have_equally_many(prompts, filling):
    size = block_size(prompts, filling)
    assert 13 * filling < size <= 28 * filling + 1  # of the former the rows are idle in 11% at most
    sizes = [min(size, prompts - at) for at in range(0, prompts, size)]
    for world in (2, 4, 8):
        dealt = [sum(sizes[rank::world]) for rank in range(world)]
        assert max(dealt) < 1.01 * prompts / world  # the others are idle for 1%


@pytest.mark.parametrize("prompts, filling", [(2000, 64), (800, 51.2), (30, 4 / 3), (1, 0.2), (5, 0.01)])
def test_blocks_of_a_short_phase_fill_the_rows_four_times(prompts, filling):
    assert block_size(prompts, filling) == max(1, int(4 * filling))


def test_the_cache_takes_half_of_what_the_weights_leave(tiny, monkeypatch):
    model, slots = load_policy(tiny()), Slots(3, 50, "cpu")
    slots.fill([0], next(zip(*sampler.prefill(model, [[5, 6]])))[:1])
    token = sum(keys.nbytes + values.nbytes for keys, values in slots.layers) / 150
    weights = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(sampler, "memory", lambda: weights + 2 * 1000 * int(token))
    assert sampler.cache_tokens(model) == 1000
    monkeypatch.setattr(sampler, "memory", lambda: weights // 2)
    assert sampler.cache_tokens(model) == 0


@pytest.mark.parametrize("tokens, message", [
    (30, "memory has room for 1 responses of 20 tokens, the longest, at a time, not 64"), (1000, "")])
def test_fewer_rows_than_asked_for_are_said_in_a_line(
        call, tiny, written, tmp_path, monkeypatch, capsys, tokens, message):
    path = written("p.jsonl", [{"prompt": "a sad poem"}])
    monkeypatch.setattr(sampler, "cache_tokens", lambda _: tokens)
    rows = run(call, tiny, path, tmp_path / "o.jsonl", "--max_new_tokens", 14)
    assert len(rows) == 5 and ("memory has room" in capsys.readouterr().out) == bool(message)


def test_what_cannot_fit_is_a_problem_before_anything_is_sampled(call, tiny, written, tmp_path, monkeypatch):
    path = written("p.jsonl", [{"prompt": "a sad poem"}])
    monkeypatch.setattr(sampler, "cache_tokens", lambda _: 10)
    with pytest.raises(Problem, match="no room for a response of .* tokens beside the model"):
        run(call, tiny, path, tmp_path / "o.jsonl")
    monkeypatch.setattr(models, "memory", lambda: 1000)
    with pytest.raises(Problem, match="a whole copy, which sampling and scoring need, takes .* can't help"):
        run(call, tiny, path, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()


def test_another_seed_gives_other_samples(call, tiny, written, prompts, tmp_path):
    path = written("p.jsonl", [{"prompt": prompts[0]}])
    runs = [run(call, tiny, path, tmp_path / f"{seed}.jsonl", "--seed", seed) for seed in (0, 1)]
    assert not {row["response"] for row in runs[0]} & {row["response"] for row in runs[1]}


def test_a_prompt_longer_than_the_context_is_a_problem_and_names_the_prompt(call, tiny, written, tmp_path):
    path = written("p.jsonl", [{"prompt": "a sad poem"}, {"prompt": "lonely " * 96}])
    with pytest.raises(Problem, match="prompt of 99 tokens .* context of 96 tokens .*'lonely lonely"):
        run(call, tiny, path, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()


def test_the_command_line_ends_with_one_line_and_exit_code_2(script, tiny, tmp_path):
    path = tmp_path / "none.jsonl"
    done = script("sampler.py", "--model", tiny(), "--prompts", path, "--out", tmp_path / "o.jsonl")
    assert done.returncode == 2
    assert done.stderr == f"sampler.py: {path}: no such file\n"
    assert not (tmp_path / "o.jsonl").exists()

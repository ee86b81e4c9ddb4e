"""pytest tests/test_packing.py

Packing loses no token, and packed attention is attention with a dense mask. tests/test_models.py checks the
same for whole models.
"""
import pytest
import torch

from common import packing, toy
from common.data import encode_chat, encode_response
from common.packing import Row, attention, collate, pair_rows, row_of, whole_chats
from common.parallel import Problem

# ---------------------------------------------------------------- rows
def test_packing_loses_no_token_and_a_response_has_all_of_its_own(pairs):
    tokenizer = toy.tokenizer()
    for number, p in enumerate(pairs[:9]):  # one to four answers, some with the same first words, one empty
        texts = [p["chosen"], p["rejected"], p["chosen"] + " the end .", ""][:number % 4 + 1]
        row = whole_chats(tokenizer, p["prompt"], texts)
        assert [[*row.trunk, *branch] for branch in row.branches] == [
            encode_chat(tokenizer, p["prompt"], text) for text in texts]
        assert len(row.trunk) <= len(encode_chat(tokenizer, p["prompt"]))
    rows, kept = pair_rows(tokenizer, pairs[:9], 100, policy=True)
    assert kept == pairs[:9]
    assert collate(rows)["targets"].tolist() == [token for pair in kept for side in ("chosen", "rejected")
                                                 for token in encode_response(tokenizer, pair[side], pair.get(
                                                     f"{side}_finished", True))]

# ---------------------------------------------------------------- attention
def dense_mask(rows, window):
    """(T, T) bool: each token sees the last `window` tokens of its own chat, itself included. A chat is the
    trunk of a row and one of its branches."""
    place = [i for row in rows for i in (*range(len(row.trunk)), *(
        len(row.trunk) + j for branch in row.branches for j in range(len(branch))))]
    owner = [(r, b) for r, row in enumerate(rows)
             for b, length in enumerate([len(row.trunk), *map(len, row.branches)]) for _ in range(length)]
    return torch.tensor([[k <= q and owner[k] in (owner[q], (owner[q][0], 0)) and place[q] - place[k] < window
                          for k in range(len(owner))] for q in range(len(owner))])

@pytest.mark.parametrize("together, window", [(1, None), (2, None), (8, None), (1, 3), (8, 3), (8, 1)])
def test_packed_attention_and_its_gradients_are_those_of_a_dense_mask(monkeypatch, together, window):
    monkeypatch.setattr(packing, "TOGETHER", together)
    rows = [Row([5] * 4, [[6] * 3, [7], []]), Row([8] * 2, [[]]), Row([5], [[9] * 7, [9] * 2])]
    inputs = collate(rows)["inputs"]
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2))
    packed, _ = attention(None, query, key, value, None, 0.3, window, inputs["chats"], inputs["places"])
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    weights = scores.masked_fill(~dense_mask(rows, window or 99), -torch.inf).softmax(-1)
    dense = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(packed, dense.transpose(1, 2))
    weights = torch.randn_like(packed)
    ours, theirs = (torch.autograd.grad((result * weights).sum(), (query, key, value))
                    for result in (packed, dense.transpose(1, 2)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "something_new"])
def test_an_option_that_packed_attention_would_ignore_is_refused(name):
    inputs = collate([row_of([5] * 3, [[]])])["inputs"]
    with pytest.raises(Problem, match=f"its attention uses {name}"):
        attention(None, *[torch.zeros(1, 2, 3, 8)] * 3, None, chats=inputs["chats"], places=inputs["places"],
                  **{name: 1.0})

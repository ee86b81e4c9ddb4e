"""pytest tests/test_packing.py

Packing loses no token, and packed attention is attention with a dense mask. tests/test_models.py checks the
same for whole models.
"""
import pytest
import torch

from common import packing, toy
from common.data import encode_chat
from common.models import load_policy
from common.packing import Row, alone, attention, collate, pack
from common.parallel import Problem

# ---------------------------------------------------------------- rows
@pytest.fixture(scope="module")
def answers(pairs):
    """Chats by prompt: one to four answers each, some with the same first words, some empty."""
    tokenizer = toy.tokenizer()
    texts = [(p["prompt"], [p["chosen"], p["rejected"], p["chosen"] + " the end .", ""][:number % 4 + 1])
             for number, p in enumerate(pairs[:9])]
    return [[encode_chat(tokenizer, prompt, text, finished=i != 1) for i, text in enumerate(group)]
            for prompt, group in texts]

def test_packing_loses_no_token_and_no_response_token_is_shared(answers):
    for chats in answers:
        row = pack(chats)
        for chat, branch, start in zip(chats, row.branches, row.starts):
            assert [*row.trunk, *branch] == chat.ids and len(row.trunk) + start == chat.start and start >= 0
    targets = collate([pack(chats) for chats in answers])["targets"].tolist()
    assert targets == [token for chats in answers for chat in chats for token in chat.ids[chat.start:]]

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
    rows = [Row([5] * 4, [[6] * 3, [7], []], [0, 0, 0]), alone([8] * 2), Row([5], [[9] * 7, [9] * 2], [0, 0])]
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

def test_a_model_that_is_not_told_which_chats_share_a_sequence_refuses_with_or_without_a_mask(tiny):
    model, ids = load_policy(tiny()), torch.tensor([[0, 0, 7, 8, 9], [4, 5, 6, 7, 8]])
    for mask in (None, (ids > 0).long()):
        with pytest.raises(Problem, match="its attention does not get the chats that share a sequence"):
            model(ids, attention_mask=mask)

@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "something_new"])
def test_an_option_that_packed_attention_would_ignore_is_refused(name):
    inputs = collate([alone([5] * 3)])["inputs"]
    with pytest.raises(Problem, match=f"its attention uses {name}"):
        attention(None, *[torch.zeros(1, 2, 3, 8)] * 3, None, chats=inputs["chats"], places=inputs["places"],
                  **{name: 1.0})

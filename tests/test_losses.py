"""pytest tests/test_losses.py

The two losses against numbers worked out by hand, and the peers' in ../shared/golden where it is there.
"""
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import dpo
from data import Chat, encode_chat, load_tokenizer
from dpo import ResponseLogps, dpo_loss, token_logps
from packing import Row, collate, pack
from parallel import load_policy, load_reward
from reward import Rewards, bradley_terry_loss


# ---------------------------------------------------------------- by hand
@pytest.mark.parametrize("logps, beta, rewards", [
    ((-1.0, -2.0, -1.5, -1.0), 0.1, (0.05, -0.1)),
    ((-30.0, -20.0, -20.0, -30.0), 0.01, (-0.1, 0.1)),
    ((-5.0, -9.0, -5.0, -9.0), 0.5, (0.0, 0.0)),
])
def test_dpo_is_minus_log_sigmoid_of_the_margin_of_rewards(logps, beta, rewards):
    losses, chosen, rejected = dpo_loss(*(torch.tensor([x]) for x in logps), beta)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(rewards[1] - rewards[0])), rel=1e-5)
    assert (chosen.item(), rejected.item()) == pytest.approx(rewards, abs=1e-6)


def test_dpo_rewards_are_detached_and_its_gradient_is_beta_times_the_doubt():
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-1.0, -2.0))
    losses, *rewards = dpo_loss(chosen, rejected, torch.tensor([-1.5]), torch.tensor([-1.0]), 0.1)
    assert not any(r.requires_grad for r in rewards)
    losses.sum().backward()
    doubt = 1 / (1 + math.exp(0.15))  # σ(−margin)
    assert chosen.grad.item() == pytest.approx(-0.1 * doubt, rel=1e-5)
    assert rejected.grad.item() == pytest.approx(0.1 * doubt, rel=1e-5)


def test_a_policy_that_is_its_own_reference_has_a_loss_of_ln_2():
    logps = torch.tensor([-3.0, -700.0, 0.0])
    assert dpo_loss(logps, 2 * logps, logps, 2 * logps, 0.1)[0].tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("chosen, rejected, loss", [
    (0.0, 0.0, math.log(2)), (2.0, -1.0, math.log(1 + math.exp(-3))), (-1.0, 2.0, math.log(1 + math.exp(3))),
    (-200.0, 200.0, 400.0),  # no overflow
])
def test_bradley_terry_is_minus_log_sigmoid_of_the_difference(chosen, rejected, loss):
    losses = bradley_terry_loss(torch.tensor([chosen]), torch.tensor([rejected]))
    assert losses.item() == pytest.approx(loss, rel=1e-5)


# ---------------------------------------------------------------- log-probabilities of responses
@pytest.fixture
def policy_and_batch(tiny, pairs):
    tokenizer = load_tokenizer(tiny())
    rows = [pack([encode_chat(tokenizer, p["prompt"], p[side]) for side in ("chosen", "rejected")])
            for p in pairs[:5]]
    return ResponseLogps(load_policy(tiny(), training=True)), collate(rows)


def test_slices_of_positions_give_the_logps_and_gradients_of_all_at_once(monkeypatch):
    torch.manual_seed(0)
    hidden, targets = torch.randn(11, 8, requires_grad=True), torch.randint(40, (11,))
    head = torch.nn.Linear(8, 40, bias=False)
    results = []
    for size in (2**24, 40 * 3):  # all at once; three positions at a time
        monkeypatch.setattr(dpo, "LOGITS", size)
        logps = token_logps(hidden, targets, head)
        results.append((logps, *torch.autograd.grad((logps * torch.arange(11)).sum(), (hidden, head.weight))))
    for whole, sliced in zip(*results):
        torch.testing.assert_close(sliced, whole)


@pytest.mark.parametrize("at_a_time", [10**6, 7])
def test_logits_exist_for_response_positions_only_and_never_for_more_than_a_slice(
        policy_and_batch, monkeypatch, at_a_time):
    policy, batch = policy_and_batch
    head, seen = policy.model.get_output_embeddings(), []
    monkeypatch.setattr(dpo, "LOGITS", at_a_time * head.weight.shape[0])
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    policy(batch)
    assert sum(seen) == len(batch["targets"]) < batch["inputs"]["input_ids"].numel()
    assert max(seen) <= at_a_time


# ---------------------------------------------------------------- golden
@pytest.fixture
def golden_batch(golden):
    """The peers' six pairs as one batch: chosen and rejected of a pair share the prompt's row."""
    pairs = json.loads((golden / "batch.json").read_text())["pairs"]
    return collate([Row(p["prompt_ids"], [p["chosen_ids"], p["rejected_ids"]], [0, 0]) for p in pairs])


def assert_gradients(model, path):
    expected = load_file(path)
    ours = {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() / gradient.abs().max() <= 1e-4, name


@pytest.mark.parametrize("beta", [0.01, 0.1])
def test_dpo_has_the_peers_logps_loss_and_gradients(golden, golden_batch, beta):
    peers = json.loads((golden / "dpo_trl.json").read_text())
    policy, reference = (ResponseLogps(load_policy(golden / name)) for name in ("policy", "reference"))
    logps = policy(golden_batch).view(-1, 2)
    with torch.no_grad():
        reference_logps = reference(golden_batch).view(-1, 2)
    for ours, theirs in ((logps, "policy_logps"), (reference_logps, "reference_logps")):
        assert ours.T.flatten().tolist() == pytest.approx(peers["_float64"][theirs], rel=1e-6)
    losses, chosen, rejected = dpo_loss(*logps.T, *reference_logps.T, beta)
    expected = peers[f"sigmoid_b{beta}"]
    assert losses.mean().item() == pytest.approx(expected["loss"], abs=1e-5)
    assert chosen.mean().item() == pytest.approx(expected["rewards/chosen"], abs=1e-5)
    assert (chosen - rejected).mean().item() == pytest.approx(expected["rewards/margins"], abs=1e-5)
    assert (chosen > rejected).float().mean().item() == pytest.approx(expected["rewards/accuracies"])
    losses.mean().backward()
    assert_gradients(policy, golden / f"dpo_grads_sigmoid_b{beta}.safetensors")


def test_the_reward_model_has_the_peers_rewards_loss_and_gradients(golden, golden_batch):
    model = Rewards(load_reward(golden / "reward", training=True))
    chosen, rejected = model(golden_batch).view(-1, 2).T
    expected = json.loads((golden / "rm_trl.json").read_text())["plain"]
    assert [*chosen.tolist(), *rejected.tolist()] == pytest.approx(expected["rewards"], rel=1e-5, abs=1e-5)
    loss = bradley_terry_loss(chosen, rejected).mean()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    loss.backward()
    assert_gradients(model, golden / "rm_grads_plain.safetensors")


def test_a_row_of_two_answers_has_the_logps_of_the_peers_padded_rows(golden):
    batch, peers = load_file(golden / "dpo_batch.safetensors"), load_file(golden / "dpo_logps.safetensors")
    chats = []
    keys = ("input_ids", "attention_mask", "completion_mask")
    for ids, real, answer in zip(*(batch[key].tolist() for key in keys)):
        chats.append(Chat(ids[:sum(real)], answer.index(1)))
    policy = ResponseLogps(load_policy(golden / "policy"))
    logps = policy(collate([pack([chat]) for chat in chats]))
    assert logps.tolist() == pytest.approx(peers["policy_logps"].tolist(), rel=1e-6)

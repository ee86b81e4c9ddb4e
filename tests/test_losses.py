"""pytest tests/test_losses.py

The two losses agree with numbers worked out by hand, and they and their gradients with TRL's, on the models
in ../shared/golden. The tests with TRL's numbers are skipped where that folder is missing.
"""
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import packing
from common.models import load_policy, load_reward
from common.packing import Row, TokenLogps, collate
from dpo import ResponseLogps, dpo_loss
from reward import Rewards, bradley_terry_loss

# ---------------------------------------------------------------- by hand
@pytest.mark.parametrize("logps, beta, rewards", [
    ((-1.0, -2.0, -1.5, -1.0), 0.1, (0.05, -0.1)),
    ((-30.0, -20.0, -20.0, -30.0), 0.01, (-0.1, 0.1)),
    ((-5.0, -9.0, -5.0, -9.0), 0.5, (0.0, 0.0)),  # the policy is its own reference: ln 2
])
def test_dpo_is_minus_log_sigmoid_of_the_margin_in_value_and_in_gradient(logps, beta, rewards):
    logps = [torch.tensor([x], requires_grad=True) for x in logps]
    losses, chosen, rejected = dpo_loss(*logps, beta)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(rewards[1] - rewards[0])), rel=1e-5)
    assert (chosen.item(), rejected.item()) == pytest.approx(rewards, abs=1e-6)
    assert not chosen.requires_grad and not rejected.requires_grad
    losses.backward()
    slope = beta / (1 + math.exp(rewards[0] - rewards[1]))  # β · σ(−margin)
    assert [x.grad.item() for x in logps[:2]] == pytest.approx([-slope, slope], rel=1e-5)

@pytest.mark.parametrize("chosen, rejected, loss", [
    (0.0, 0.0, math.log(2)), (2.0, -1.0, math.log(1 + math.exp(-3))), (-1.0, 2.0, math.log(1 + math.exp(3))),
    (-200.0, 200.0, 400.0),  # no overflow
])
def test_bradley_terry_is_minus_log_sigmoid_of_the_difference(chosen, rejected, loss):
    losses = bradley_terry_loss(torch.tensor([chosen]), torch.tensor([rejected]))
    assert losses.item() == pytest.approx(loss, rel=1e-5)

# ---------------------------------------------------------------- log-probabilities of responses
class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if torch.is_tensor(x))])
        return result

@pytest.mark.parametrize("width", [400, 1000, 150, 133, 1])
def test_token_logps_are_those_of_log_softmax_without_the_logits_of_all_tokens_at_once(monkeypatch, width):
    torch.manual_seed(0)
    hidden, head = torch.randn(11, 8, requires_grad=True), torch.randn(400, 8, requires_grad=True)
    targets, loss = torch.randint(400, (11,)), torch.linspace(-1, 2, 11)
    monkeypatch.setattr(packing, "LOGITS", width * len(hidden))  # so a tile has `width` of the 400 tokens
    expected = (hidden @ head.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad(expected @ loss, (hidden, head))
    with Largest() as largest:
        logps = TokenLogps.apply(hidden, head, targets)
        for _ in range(2):  # a backward pass must not overwrite what the next one needs
            ours = torch.autograd.grad(logps @ loss, (hidden, head), retain_graph=True)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-4)
    assert largest.elements == max(min(width, 400) * len(hidden), head.numel())

# ---------------------------------------------------------------- TRL's numbers
@pytest.fixture
def golden_batch(golden):
    """TRL's six pairs as one batch, in which the two answers of a pair share a row with the prompt."""
    pairs = json.loads((golden / "batch.json").read_text())["pairs"]
    return collate([Row(p["prompt_ids"], [p["chosen_ids"], p["rejected_ids"]]) for p in pairs])

def assert_gradients(model, path):
    expected = load_file(path)
    ours = {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() / gradient.abs().max() <= 1e-4, name

@pytest.mark.parametrize("beta", [0.01, 0.1])
def test_dpo_has_trls_logps_loss_and_gradients(golden, golden_batch, beta):
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

def test_the_reward_model_has_trls_rewards_loss_and_gradients(golden, golden_batch):
    model = Rewards(load_reward(golden / "reward", training=True))
    chosen, rejected = model(golden_batch).view(-1, 2).T
    expected = json.loads((golden / "rm_trl.json").read_text())["plain"]
    assert [*chosen.tolist(), *rejected.tolist()] == pytest.approx(expected["rewards"], rel=1e-5, abs=1e-5)
    loss = bradley_terry_loss(chosen, rejected).mean()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    loss.backward()
    assert_gradients(model, golden / "rm_grads_plain.safetensors")

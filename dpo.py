"""Train a policy on preference pairs by DPO: pairs.jsonl -> policy folder. Run alone, this is offline DPO.

    torchrun --nproc-per-node 8 dpo.py --model MODEL --pairs pairs.jsonl --out runs/policy

The reference is the policy itself before the first step. Its log-probabilities are computed once, before
training, by the same code, in the same precision and the same micro-batches. The loss of the first step is
therefore known (ln 2 if no pair has a weight), and training stops with an error if it is another. How several
processes share a step stands in common/training.py. reward.py is a twin of this script.

Left out on purpose: other losses. To try one, replace `dpo_loss`, as scripts in variants/ do.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common import models, packing, run, training
from common.data import SIDES, load_tokenizer, read_pairs
from common.packing import TokenLogps, collate, how_many
from common.parallel import device, quiet, say, world
from common.probe import verify
from common.run import option

def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pairs=None):
    """DPO (arXiv 2305.18290, eq. 7) on the log-probabilities of whole responses, in nats, all (B,).

    Returns the losses (B,) and the rewards of chosen and rejected responses (B,), which are beta times the
    log-ratio to the reference, detached. pairs: their rows, for a loss that needs more fields. The B pairs
    are one micro-batch of one process, so a loss that averages over them, as KTO's baseline does, would
    depend on --micro_batch and on the number of processes."""
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

class ResponseLogps(torch.nn.Module):
    """A causal LM as a function from packed rows (packing.collate) to the log π(y|x) of each answer: the sum
    of its tokens' log-probabilities in fp32, (answers,)."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, packed):
        verify(self.model)
        if self.model.plain_head:
            hidden = packing.hidden_states(self.model, packed)[packed["sources"]]  # (N, H)
            head = self.model.get_output_embeddings().weight
            logps = TokenLogps.apply(hidden, head, packed["targets"])  # (N,)
        else:  # the model changes its logits after the head: slower, and all logits exist at once
            logits = packing.response_logits(self.model, packed).float()
            logps = -F.cross_entropy(logits, packed["targets"], reduction="none")
        return torch.zeros(len(packed["last"]), device=logps.device).index_add(0, packed["owners"], logps)

def train(folder, pairs, *, beta, lr, batch, micro_batch, max_length, epochs=1, seed=0, recompute=False,
          reference=None, log):
    """Train the policy in `folder` by DPO. After each step yield (number of the step, number of all steps,
    policy), so that the caller can save a checkpoint.

    pairs: rows with prompt, chosen and rejected. A `weight` multiplies the pair's loss. reference: the folder
    of another policy with the same tokenizer, to be the reference instead of the policy in `folder`."""
    rows, kept = packing.pair_rows(load_tokenizer(folder), pairs, max_length, policy=True)
    steps = training.steps_of([len(row) for row in rows], batch, micro_batch, seed, epochs)
    weights = torch.tensor([pair.get("weight", 1.0) for pair in kept], device=device())
    say(f"DPO: {how_many(len(kept), len(pairs))}, {len(steps)} steps of {batch}")
    log(pairs=len(kept), pairs_dropped=len(pairs) - len(kept), **{
        f"{side}_tokens": sum(len(row.branches[i]) for row in rows) / len(rows)
        for i, side in enumerate(SIDES)})

    policy = load(folder, rows, recompute)
    epoch = steps[:len(steps) // epochs]
    start = all_logps(policy, rows, epoch[:1] if reference else epoch)
    ref_logps = all_logps(load(reference, rows), rows, epoch) if reference else start

    def pair_loss(numbers, logps):  # numbers (B,): which pairs; logps (B, 2): of chosen and rejected
        losses, chosen, rejected = dpo_loss(*logps.T, *ref_logps[numbers].T, beta, [kept[i] for i in numbers])
        return losses * weights[numbers], chosen, rejected

    def loss(numbers):
        logps = pair_logps(policy, rows, numbers)
        losses, chosen, rejected = pair_loss(numbers, logps)
        return losses, {
            "rewards/chosen": chosen, "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(), "rewards/margins": chosen - rejected,
            "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}

    first_loss = training.mean_loss(steps[0], lambda numbers: pair_loss(numbers, start[numbers])[0])
    for number in training.optimise(
            policy, steps, loss, lr=lr, log=log, first_loss=first_loss,
            shown="margins {rewards/margins:+.4f}  accuracies {rewards/accuracies:.3f}  "):
        yield number, len(steps), policy

def load(folder, rows, recompute=False):
    """Load the policy as a ResponseLogps, sharded over all processes. Check that the rows fit its context."""
    policy = models.load_policy(folder, training=True)
    packing.check_context(rows, policy, folder)
    return training.shard(ResponseLogps(policy), recompute)

def pair_logps(policy, rows, numbers):
    """Log-probabilities (B, 2) of the chosen and rejected answers of the pairs with these numbers."""
    return policy(collate([rows[i] for i in numbers], device())).view(-1, 2)

@torch.no_grad()
def all_logps(policy, rows, steps):
    """Log-probabilities (pairs, 2) of the chosen and rejected answers of all pairs in these steps, computed
    in the micro-batches of training so that rounding is the same. The rows of other pairs are 0."""
    logps = torch.zeros(len(rows), 2, device=device())
    for step in tqdm(steps, desc="log-probabilities", disable=quiet(), leave=False):
        for micro in step:
            values = pair_logps(policy, rows, micro.numbers)
            if micro.share:  # 0 marks a filler: another process adds this pair
                logps[micro.numbers] = values
    if world() > 1:
        dist.all_reduce(logps)
    return logps

@dataclass
class Options:
    model: str = option(help="policy to start from: a folder or hub id")
    pairs: str = option(help="preference pairs with prompt, chosen, rejected and, optionally, weight")
    out: str = option(help="folder of the trained policy")
    beta: float = option(0.01)
    lr: float = option(7e-7)
    batch: int = option(128, "pairs per optimiser step, over all processes")
    epochs: int = option(1)
    micro_batch: int = option(2, "pairs per forward pass and process")
    max_length: int = option(2048, "leave out pairs whose prompt and answer have more tokens")
    seed: int = option(0)
    recompute: bool = option(torch.cuda.is_available(), "recompute activations: slower, less memory")
    overwrite: bool = option(False, "delete the result that --out holds and start again")

def main():
    o = run.parse(Options)
    folder, pairs, out = models.local_folder(o.model), read_pairs(o.pairs), Path(o.out)
    run.claim(out, o)
    if not run.exists(out / "config.json"):
        settings = {k: v for k, v in vars(o).items() if k not in ("model", "pairs", "out", "overwrite")}
        for step, steps, policy in train(
                folder, pairs, **settings, log=run.open_log(out / "metrics.jsonl", "dpo")):
            if step == steps:
                models.save(policy, folder, out)
    say(f"{out} is complete")

if __name__ == "__main__":
    run.launch(main)

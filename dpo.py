"""Train a policy on preference pairs by DPO: pairs.jsonl -> policy folder. Alone, this is offline DPO.

    python dpo.py --model MODEL --pairs pairs.jsonl --out runs/policy
    torchrun --nproc-per-node 8 dpo.py --model MODEL --pairs pairs.jsonl --out runs/policy

The reference is the policy itself before the first step: its log-probabilities are computed once, by the same
code, in the same precision and the same micro-batches. So the first loss is known, ln 2 for DPO, and the run
stops when it is another. Twin of reward.py.

Left out on purpose: other losses (replace `dpo_loss`, as variants/ do).
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import manifest
import models
import run
import training
from data import check_context, kept_of, load_tokenizer, quiet, read_pairs
from packing import ResponseLogps, collate, pair_rows
from parallel import device, say, shard, world
from run import option
from training import resume_of


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pairs=None):
    """DPO (arXiv 2305.18290, eq. 7) on log-probabilities of whole responses in nats, all (B,).

    Returns losses (B,), and chosen and rejected rewards (B,), detached: beta × log-ratio to the reference.
    pairs: the B pairs, for a loss in its place that wants more of them than DPO does.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def train(folder, pairs, *, beta, lr, batch, micro_batch, max_length, epochs=1, seed=0, recompute=False,
          resume=None, reference=None, log):
    """DPO from the policy in `folder`; `pairs` as read_pairs gives them, perhaps with a `weight`. reference:
    the folder of another policy with the same tokenizer, to be the reference.
    After each step yields its number, how many there are, and the policy, to be saved or not."""
    rows, kept = pair_rows(load_tokenizer(folder), pairs, max_length, unfinished=True)
    steps = training.steps_of([len(row) for row in rows], batch, micro_batch, seed, epochs)
    epoch = steps[:len(steps) // epochs]
    ref_logps = reference_logps(load(reference, rows), rows, epoch) if reference else None
    policy = load(folder, rows, recompute)
    weights = torch.tensor([pair.get("weight", 1.0) for pair in kept], device=device())
    say(f"DPO: {kept_of(len(kept), len(pairs))}, {len(steps)} steps of {batch}")
    mean_tokens = {f"{side}_tokens": sum(len(r.branches[i]) - r.starts[i] for r in rows) / len(rows)
                   for i, side in enumerate(("chosen", "rejected"))}
    log(pairs=len(kept), pairs_dropped=len(pairs) - len(kept), **mean_tokens)

    def pair_loss(numbers, logps):
        some = [kept[i] for i in numbers]
        losses, chosen, rejected = dpo_loss(*logps.T, *ref_logps[numbers].T, beta, some)
        return losses * weights[numbers], chosen, rejected

    def loss(numbers):
        both = pair_logps(policy, rows, numbers)
        losses, chosen, rejected = pair_loss(numbers, both)
        return losses, {
            "rewards/chosen": chosen, "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(), "rewards/margins": chosen - rejected,
            "logps/chosen": both[:, 0], "logps/rejected": both[:, 1]}

    start = reference_logps(policy, rows, epoch[:1] if reference else epoch)
    ref_logps = ref_logps if reference else start
    first_loss = training.mean(steps[0], lambda numbers: pair_loss(numbers, start[numbers])[0])
    for number in training.optimise(
            policy, steps, loss, lr=lr, log=log, first_loss=first_loss, resume=resume,
            shown="margins {rewards/margins:+.4f}  accuracies {rewards/accuracies:.3f}  "):
        yield number, len(steps), policy


def load(folder, rows, recompute=False):
    """The policy in `folder` as a function from packed rows to log-probabilities, over all processes."""
    policy = models.load_policy(folder, training=True)
    check_context(rows, policy, folder)
    return shard(ResponseLogps(policy), recompute)


def pair_logps(policy, rows, numbers):
    """(B, 2): of each pair's chosen and rejected answer, which `pair_rows` laid next to each other."""
    return policy(collate([rows[i] for i in numbers], device())).view(-1, 2)


@torch.no_grad()
def reference_logps(policy, rows, steps):
    """(pairs, 2): log-probabilities of the answers in these steps, in their micro-batches."""
    reference = torch.zeros(len(rows), 2, device=device())
    for step in tqdm(steps, desc="reference", disable=quiet(), leave=False):
        for micro in step:
            values = pair_logps(policy, rows, micro.numbers)
            if micro.shares[0]:  # else it only fills up, and another process has the row
                reference[micro.numbers] = values
    if world() > 1:
        dist.all_reduce(reference)
    return reference


@dataclass
class Options:
    model: str = option(help="policy to start from: a folder or hub id")
    pairs: str = option(help="preference pairs: prompt, chosen, rejected, perhaps weight")
    out: str = option(help="folder of the trained policy")
    beta: float = option(0.01)
    lr: float = option(7e-7)
    batch: int = option(128, "pairs per optimiser step, over all processes")
    epochs: int = option(1)
    micro_batch: int = option(2, "pairs per forward pass and process")
    max_length: int = option(2048, "tokens of prompt and answer; longer pairs are left out")
    seed: int = option(0)
    resume_every: int = option(0, "steps of training that a kill may cost; 0: all")
    log_every: int = option(0, "steps between lines on the screen; 0: none, just a bar")
    report_to: str = option("", "wandb or tensorboard: the metrics there, too")
    recompute: bool = option(torch.cuda.is_available(), "recompute activations: slower, less memory")


def main():
    o = run.parse(Options)
    folder, pairs, out = models.local_folder(o.model), read_pairs(o.pairs), Path(o.out)
    manifest.claim(out, o)
    if not run.exists(out / "config.json"):
        for step, steps, policy in train(
                folder, pairs, beta=o.beta, lr=o.lr, batch=o.batch, micro_batch=o.micro_batch,
                max_length=o.max_length, epochs=o.epochs, seed=o.seed, recompute=o.recompute,
                resume=(resume_of(out), o.resume_every),
                log=run.open_log(out / "metrics.jsonl", "dpo", o.log_every, o.report_to)):
            if step == steps:
                models.save(policy, folder, out)
    run.remove_all(resume_of(out))
    say(f"{out} is complete")


if __name__ == "__main__":
    run.launch(main)

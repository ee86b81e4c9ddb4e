"""Train a policy on preference pairs by DPO: pairs.jsonl -> policy folder. Alone, this is offline DPO.

    python dpo.py --model MODEL --pairs pairs.jsonl --out runs/policy
    torchrun --nproc-per-node 8 dpo.py --model MODEL --pairs pairs.jsonl --out runs/policy

The reference is the policy itself before the first step: its log-probabilities are computed once, by the same
code, in the same precision and the same batches. So the first loss is ln 2, and the run stops when it isn't.
Twin of reward.py.

Left out on purpose: other losses (change `dpo_loss`), a reference other than the start,
resuming inside an epoch.
"""
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
import parallel
import run
import training
from data import Problem, check_context, load_tokenizer, read_pairs
from packing import ResponseLogps, collate, pair_rows
from parallel import device, say, world
from run import exists, launch, parse, writing


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """DPO (arXiv 2305.18290, eq. 7) on log-probabilities of whole responses in nats, all (B,).

    Returns losses (B,), and chosen and rejected rewards (B,), detached: beta × log-ratio to the reference.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def train(folder, pairs, out, *, beta, lr, batch, micro_batch, max_length, epochs=1, save_every=0, seed=0,
          recompute=False, log):
    """DPO from the policy in `folder`; `pairs` as read_pairs gives them.

    Writes out/step-N every `save_every` steps (0: never) and after the last. Returns the number of steps.
    """
    tokenizer = load_tokenizer(folder)
    rows, dropped = pair_rows(tokenizer, pairs, max_length, unfinished=True)
    if not rows:
        raise Problem(f"none of {len(pairs)} pairs is short enough for --max_length {max_length}")
    policy = models.load_policy(folder, training=True)
    check_context(rows, policy, folder)
    policy = parallel.shard(ResponseLogps(policy), recompute)
    optimizer = training.adamw(policy, lr)
    steps = training.batches([len(row) for row in rows], batch, micro_batch, seed, epochs)
    say(f"DPO: {len(rows)} pairs ({dropped} too long), {len(steps)} steps of {batch}")
    mean_tokens = {f"{side}_tokens": sum(len(r.branches[i]) - r.starts[i] for r in rows) / len(rows)
                   for i, side in enumerate(("chosen", "rejected"))}
    log(**{"pairs": len(rows), "pairs_dropped": dropped, **mean_tokens})

    def logps(micro):
        both = policy(collate([rows[i] for i, _ in micro], device())).view(-1, 2)
        return both[:, 0], both[:, 1]

    with torch.no_grad():  # the reference, before the first step
        reference = [[logps(micro) for micro in step]
                     for step in tqdm(steps, desc="reference", disable=parallel.rank() > 0, leave=False)]
    for number, (step, refs) in enumerate(zip(steps, reference), 1):
        sums = {}
        for micro, ref in zip(step, refs):
            chosen_logps, rejected_logps = logps(micro)
            losses, chosen, rejected = dpo_loss(chosen_logps, rejected_logps, *ref, beta)
            weight = torch.tensor([w for _, w in micro], device=losses.device)
            # FSDP averages over processes: times their number is the sum
            (losses @ weight * world()).backward()
            for name, value in {
                    "loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected,
                    "rewards/accuracies": (chosen > rejected).float(), "rewards/margins": chosen - rejected,
                    "logps/chosen": chosen_logps, "logps/rejected": rejected_logps}.items():
                sums[name] = sums.get(name, 0.0) + (value.detach() @ weight).item()
        metrics = training.total(sums)
        training.check_finite(number, loss=metrics["loss"])
        _check_ln2(metrics["loss"], number)
        now = lr * training.cosine(number - 1, len(steps))
        metrics |= {"learning_rate": now, "grad_norm": training.clip_and_step(policy, optimizer, now)}
        training.check_finite(number, grad_norm=metrics["grad_norm"])
        log("step {step}/{steps}  loss {loss:.4f}  margins {rewards/margins:+.4f}  "
            "accuracies {rewards/accuracies:.3f}  grad_norm {grad_norm:.2f}  lr {learning_rate:.2e}",
            step=number, steps=len(steps), **metrics)
        if number == len(steps) or save_every and number % save_every == 0:
            models.save(policy, folder, Path(out) / f"step-{number}")
    return len(steps)


def _check_ln2(loss, number):
    if number == 1 and abs(loss - math.log(2)) > (1e-6 if device().type == "cpu" else 1e-3):
        raise Problem(f"the loss of step 1 is {loss:.7f} and not ln 2: "
                      "the policy differs from its own reference")


@dataclass
class Options:
    model: str = field(metadata={"help": "policy to start from: a folder or hub id"})
    pairs: str = field(metadata={"help": "preference pairs: prompt, chosen, rejected"})
    out: str = field(metadata={"help": "folder of the trained policy"})
    beta: float = 0.01
    lr: float = 7e-7
    batch: int = field(default=128, metadata={"help": "pairs per optimiser step, over all processes"})
    epochs: int = 1
    micro_batch: int = field(default=2, metadata={"help": "pairs per forward pass and process"})
    max_length: int = field(default=2048,
                            metadata={"help": "tokens of prompt and answer; longer pairs are left out"})
    seed: int = 0
    recompute: bool = field(default_factory=torch.cuda.is_available,
                            metadata={"help": "gradient checkpointing: less memory, a third more time"})


def main():
    o = parse(Options)
    folder, pairs = models.local_folder(o.model), read_pairs(o.pairs)
    run.claim(o.out, o)
    out = Path(o.out)
    if not exists(out / "config.json"):
        with writing(out / "checkpoints") as temporary:
            steps = train(folder, pairs, temporary, beta=o.beta, lr=o.lr, batch=o.batch,
                          micro_batch=o.micro_batch, max_length=o.max_length, epochs=o.epochs, seed=o.seed,
                          recompute=o.recompute, log=run.Log(out / "metrics.jsonl", "dpo"))
        run.move_up(out / "checkpoints" / f"step-{steps}", out)
    say(f"{out} is complete")


if __name__ == "__main__":
    launch(main)

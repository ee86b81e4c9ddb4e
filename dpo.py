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

import parallel
from data import Problem, check_context, load_tokenizer, read_pairs
from packing import collate, pair_rows
from parallel import device, exists, launch, parse, say, world, writing

LOGITS = 2**23  # logits in memory at a time (32 MB in fp32)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """DPO (arXiv 2305.18290, eq. 7) on log-probabilities of whole responses in nats, all (B,).

    Returns losses (B,), and chosen and rejected rewards (B,), detached: beta × log-ratio to the reference.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


class ResponseLogps(torch.nn.Module):
    """A causal LM as a function from a batch of rows (packing.collate) to log π(y|x) of each answer, fp32."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        hidden = self.model.base_model(**batch["inputs"], use_cache=False).last_hidden_state
        hidden = hidden[0][batch["sources"]]  # (N, H): positions that predict a response token
        logps = TokenLogps.apply(hidden, self.model.get_output_embeddings().weight, batch["targets"])  # (N,)
        return torch.zeros(len(batch["last"]), device=logps.device).index_add(0, batch["owners"], logps)


class TokenLogps(torch.autograd.Function):
    """(N, H) hidden states, (V, H) head, (N,) targets -> (N,) fp32 log-probabilities: log_softmax and gather,
    a tile of the vocabulary at a time. The logits of all tokens never exist at once; the backward pass
    computes them again, unless they fitted into one tile."""
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        size = max(1, LOGITS // len(hidden))
        total = torch.full(targets.shape, -torch.inf, device=hidden.device)  # log Σ exp(logits) so far
        chosen = torch.zeros_like(total)                                     # logits of the targets
        for at in range(0, len(weight), size):
            logits = (hidden @ weight[at:at + size].T).float()
            total = torch.logaddexp(total, logits.logsumexp(-1))
            column, inside = _column(targets, at, logits)
            chosen = torch.where(inside, logits.gather(1, column)[:, 0], chosen)
        ctx.save_for_backward(hidden, weight, targets, total, logits if size >= len(weight) else None)
        ctx.size = size
        return chosen - total

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, total, kept = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        for at in range(0, len(weight), ctx.size):
            tile = weight[at:at + ctx.size]
            logits = (hidden @ tile.T).float() if kept is None else kept
            column, inside = _column(targets, at, logits)
            # ∂ log p(target) / ∂ logits = 1[target] − softmax(logits)
            grad_logits = (logits - total[:, None]).exp_().mul_(-grad[:, None])
            grad_logits = grad_logits.scatter_add_(1, column, (grad * inside)[:, None]).to(hidden.dtype)
            torch.mm(grad_logits.T, hidden, out=grad_weight[at:at + ctx.size])
            grad_hidden += grad_logits @ tile
        return grad_hidden.to(hidden.dtype), grad_weight, None


def _column(targets, at, logits):
    """Columns (N, 1) of the targets in the tile that begins with token `at`; whether they are in it (N,)."""
    column = targets - at
    inside = (column >= 0) & (column < logits.shape[1])
    return (column * inside)[:, None], inside


def train(folder, pairs, out, *, beta, lr, batch, micro_batch, max_length, epochs=1, save_every=0, seed=0,
          recompute=False, log):
    """DPO from the policy in `folder`; `pairs` as read_pairs gives them.

    Writes out/step-N every `save_every` steps (0: never) and after the last. Returns the number of steps.
    """
    tokenizer = load_tokenizer(folder)
    rows, dropped = pair_rows(tokenizer, pairs, max_length, unfinished=True)
    if not rows:
        raise Problem(f"none of {len(pairs)} pairs is short enough for --max_length {max_length}")
    policy = parallel.load_policy(folder, training=True)
    check_context(rows, policy, folder)
    policy = parallel.shard(ResponseLogps(policy), recompute)
    optimizer = parallel.adamw(policy, lr)
    steps = parallel.batches([len(row) for row in rows], batch, micro_batch, seed, epochs)
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
        metrics = parallel.total(sums)
        parallel.check_finite(number, loss=metrics["loss"])
        _check_ln2(metrics["loss"], number)
        now = lr * parallel.cosine(number - 1, len(steps))
        metrics |= {"learning_rate": now, "grad_norm": parallel.clip_and_step(policy, optimizer, now)}
        parallel.check_finite(number, grad_norm=metrics["grad_norm"])
        log("step {step}/{steps}  loss {loss:.4f}  margins {rewards/margins:+.4f}  "
            "accuracies {rewards/accuracies:.3f}  grad_norm {grad_norm:.2f}  lr {learning_rate:.2e}",
            step=number, steps=len(steps), **metrics)
        if number == len(steps) or save_every and number % save_every == 0:
            parallel.save(policy, folder, Path(out) / f"step-{number}")
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
    folder, pairs = parallel.local_folder(o.model), read_pairs(o.pairs)
    parallel.claim(o.out, o)
    out = Path(o.out)
    if not exists(out / "config.json"):
        with writing(out / "checkpoints") as temporary:
            steps = train(folder, pairs, temporary, beta=o.beta, lr=o.lr, batch=o.batch,
                          micro_batch=o.micro_batch, max_length=o.max_length, epochs=o.epochs, seed=o.seed,
                          recompute=o.recompute, log=parallel.Log(out / "metrics.jsonl", "dpo"))
        parallel.move_up(out / "checkpoints" / f"step-{steps}", out)
    say(f"{out} is complete")


if __name__ == "__main__":
    launch(main)

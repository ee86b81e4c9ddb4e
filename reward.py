"""Train a reward model on preference pairs by Bradley-Terry, or score samples with one.

    python reward.py --model MODEL --pairs train.jsonl --test test.jsonl --out runs/rm
    python reward.py --model runs/rm --samples samples.jsonl --out scored.jsonl

The reward is the raw logit at the last token of the chat. A causal LM is taken too and gets a fresh head.
Twin of dpo.py.

Left out on purpose: margins and centring in the loss, heads with several labels, resuming inside an epoch.
"""
import math
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
import parallel
import run
import training
from data import (
    Problem,
    check_context,
    check_prompt,
    encode_chat,
    load_tokenizer,
    prompt_id,
    quiet,
    read_pairs,
    read_rows,
)
from packing import collate, pack, pair_rows
from parallel import device, say, world
from run import exists, in_blocks, launch, parse, writing


def bradley_terry_loss(chosen_rewards, rejected_rewards):
    """−log σ(r(x, y_w) − r(x, y_l)), (B,) and (B,) -> (B,)
    (arXiv 2506.06292, the M-step; Bradley & Terry 1952)."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


class Rewards(torch.nn.Module):
    """A sequence classifier as a function from a batch of rows (packing.collate)
    to the reward of each answer, fp32."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        hidden = self.model.base_model(**batch["inputs"], use_cache=False).last_hidden_state
        last = hidden[0][batch["last"]].float()  # (answers, H)
        return F.linear(last, self.model.score.weight.float())[:, 0]


def train(folder, pairs, out, *, lr, batch, micro_batch, max_length, epochs=1, seed=0, recompute=False,
          fresh_head=False, log):
    """Bradley-Terry from the model in `folder`; `pairs` as read_pairs gives them. Writes the folder `out`."""
    tokenizer = load_tokenizer(folder)
    rows, dropped = pair_rows(tokenizer, pairs, max_length)
    if not rows:
        raise Problem(f"none of {len(pairs)} pairs is short enough for --max_length {max_length}")
    model = models.load_reward(folder, True, fresh_head, seed)
    check_context(rows, model, folder)
    model = parallel.shard(Rewards(model), recompute)
    optimizer = training.adamw(model, lr)
    steps = training.batches([len(row) for row in rows], batch, micro_batch, seed, epochs)
    say(f"reward model: {len(rows)} pairs ({dropped} too long), {len(steps)} steps of {batch}")
    log(**{"pairs": len(rows), "pairs_dropped": dropped})
    for number, step in enumerate(steps, 1):
        sums = {}
        for micro in step:
            chosen, rejected = model(collate([rows[i] for i, _ in micro], device())).view(-1, 2).T
            losses = bradley_terry_loss(chosen, rejected)
            weight = torch.tensor([w for _, w in micro], device=losses.device)
            # FSDP averages over processes: times their number is the sum
            (losses @ weight * world()).backward()
            for name, value in {"loss": losses, "accuracy": (chosen > rejected).float(),
                                "margin": chosen - rejected, "mean_reward": (chosen + rejected) / 2}.items():
                sums[name] = sums.get(name, 0.0) + (value.detach() @ weight).item()
        metrics = training.total(sums)
        training.check_finite(number, loss=metrics["loss"])
        now = lr * training.cosine(number - 1, len(steps))
        metrics |= {"learning_rate": now, "grad_norm": training.clip_and_step(model, optimizer, now)}
        training.check_finite(number, grad_norm=metrics["grad_norm"])
        log("step {step}/{steps}  loss {loss:.4f}  margin {margin:+.4f}  accuracy {accuracy:.3f}  "
            "grad_norm {grad_norm:.2f}  lr {learning_rate:.2e}", step=number, steps=len(steps), **metrics)
    models.save(model, folder, Path(out))


@torch.inference_mode()
def score_answers(model, tokenizer, prompt_answers, batch):
    """[(prompt, [answers])] -> [[reward]], `batch` prompts in a forward pass, like lengths together."""
    rows = [pack([encode_chat(tokenizer, prompt, answer, whole=True) for answer in answers])
            for prompt, answers in prompt_answers]
    check_context(rows, model.model, tokenizer.name_or_path)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    rewards = [None] * len(rows)
    for at in range(0, len(order), batch):
        some = order[at:at + batch]
        values = model(collate([rows[i] for i in some], device())).tolist()
        for i in some:
            rewards[i], values = values[:len(rows[i].branches)], values[len(rows[i].branches):]
    return rewards


def score(folder, samples, out, batch):
    """samples: rows with prompt and response -> the same rows with `score` and `rm`, in `out`."""
    tokenizer = load_tokenizer(folder)
    model = Rewards(parallel.replicate(models.load_reward(folder)))

    def work(block):
        groups = [list(group) for _, group in groupby(block, key=lambda row: prompt_id(row["prompt"]))]
        prompt_answers = [(group[0]["prompt"], [row["response"] for row in group]) for group in groups]
        rewards = score_answers(model, tokenizer, prompt_answers, batch)
        for row, reward in zip(block, [r for group in rewards for r in group]):
            if not math.isfinite(reward):
                raise Problem(f"{folder} gives the reward {reward} "
                              f"to an answer to {str(row['prompt'])[:60]!r}")
            yield {**row, "score": reward, "rm": str(folder)}

    per_prompt = len(list(next(groupby(samples, key=lambda row: prompt_id(row["prompt"])))[1]))
    in_blocks(samples, 64 * per_prompt, out, work, f"scoring {Path(out).stem}")


def ordered(folder, pairs, batch):
    """Per pair, whether its chosen answer gets the higher reward; equal rewards are wrong
    (RewardBench's rule, arXiv 2403.13787)."""
    model, tokenizer = Rewards(parallel.replicate(models.load_reward(folder))), load_tokenizer(folder)
    right = []
    for at in tqdm(range(0, len(pairs), 32 * batch), desc="scoring pairs", leave=False, disable=quiet()):
        some = pairs[at:at + 32 * batch]
        rewards = score_answers(model, tokenizer, [(p["prompt"], [p["chosen"], p["rejected"]]) for p in some],
                                batch)
        for pair, both in zip(some, rewards):
            if not all(map(math.isfinite, both)):
                raise Problem(f"{folder} gives the rewards {both} to the answers to "
                              f"{str(pair['prompt'])[:60]!r}")
            right.append(both[0] > both[1])
    return right


def accuracy(folder, pairs, batch):
    """Share of pairs whose chosen answer gets the higher reward."""
    return sum(ordered(folder, pairs, batch)) / len(pairs)


@dataclass
class Options:
    model: str = field(
        metadata={"help": "reward model, or a causal LM to give a head to: a folder or hub id"})
    out: str = field(metadata={"help": "folder of the trained reward model, or the scored samples.jsonl"})
    pairs: str = field(default="", metadata={"help": "to train: preference pairs (prompt, chosen, rejected)"})
    test: str = field(default="", metadata={"help": "pairs to report the accuracy on"})
    samples: str = field(default="", metadata={"help": "to score: rows with prompt and response"})
    lr: float = 2e-6
    batch: int = field(default=512, metadata={"help": "pairs per optimiser step, over all processes"})
    epochs: int = 1
    micro_batch: int = field(default=2,
                             metadata={"help": "pairs (scoring: prompts) per forward pass and process"})
    max_length: int = field(default=2048,
                            metadata={"help": "tokens of prompt and answer; longer pairs are left out"})
    seed: int = 0
    recompute: bool = field(default_factory=torch.cuda.is_available,
                            metadata={"help": "gradient checkpointing: less memory, a third more time"})


def main():
    o = parse(Options)
    if bool(o.pairs) == bool(o.samples):
        raise Problem("give --pairs to train or --samples to score")
    folder, out = models.local_folder(o.model), Path(o.out)
    if o.samples:
        return score_file(folder, o)
    pairs, test = read_pairs(o.pairs), read_pairs(o.test) if o.test else []
    run.claim(out, o)
    if not exists(out / "config.json"):
        with writing(out / "checkpoint") as temporary:
            train(folder, pairs, temporary, lr=o.lr, batch=o.batch, micro_batch=o.micro_batch,
                  max_length=o.max_length, epochs=o.epochs, seed=o.seed, recompute=o.recompute,
                  fresh_head=True, log=run.Log(out / "metrics.jsonl", "reward"))
        run.move_up(out / "checkpoint", out)
    if test:
        say(f"accuracy on {o.test}: {accuracy(str(out), test, o.micro_batch):.4f} of {len(test)} pairs")
    say(f"{out} is complete")


def score_file(folder, o):
    rows = read_rows(o.samples)
    for where, row in rows:
        check_prompt(where, row.get("prompt"))
        if not isinstance(row.get("response"), str):
            raise Problem(f"{where}: no response (a field `response` with text)")
    run.claim(o.out, o, file=True)
    if not exists(o.out):
        score(folder, [row for _, row in rows], o.out, o.micro_batch)
    say(f"{o.out} is complete")


if __name__ == "__main__":
    launch(main)

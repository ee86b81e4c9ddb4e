"""Train a reward model on preference pairs by Bradley-Terry, or score samples with one.

    python reward.py --model MODEL --pairs train.jsonl --out runs/rm
    python reward.py --model runs/rm --samples samples.jsonl --out scored.jsonl

The reward is the raw logit at the last token of the chat. A causal LM is taken too and gets a fresh head.
Twin of dpo.py.

Left out on purpose: margins and centring in the loss, heads with several labels.
"""
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import models, run, training
from common.data import Problem, by_prompt, encode_chat, load_tokenizer, read_jsonl, read_pairs, read_samples
from common.packing import check_context, collate, hidden_states, how_many, pack, pair_rows
from common.parallel import device, replicate, say
from common.probe import verify
from common.run import option
from sampler import sample

def bradley_terry_loss(chosen_rewards, rejected_rewards, pairs=None):
    """−log σ(r(x, y_w) − r(x, y_l)), (B,) and (B,) -> (B,)
    (arXiv 2506.06292, the M-step; Bradley & Terry 1952).
    pairs: the B pairs, for a loss in its place that wants more of them."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)

class Rewards(torch.nn.Module):
    """A sequence classifier as a function from packed rows (packing.collate) to each answer's reward."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, packed):
        verify(self.model)
        last = hidden_states(self.model, packed)[packed["last"]].float()  # (answers, H)
        return F.linear(last, self.model.score.weight.float()).squeeze(-1).clone()  # FSDP warns about views

def train(folder, pairs, *, lr, batch, micro_batch, max_length, epochs=1, seed=0, recompute=False,
          fresh_head=False, log):
    """Bradley-Terry from the model in `folder`; `pairs` as read_pairs gives them, perhaps with a `weight`.
    Returns the model, to be saved."""
    rows, kept = pair_rows(load_tokenizer(folder), pairs, max_length)
    steps = training.steps_of([len(row) for row in rows], batch, micro_batch, seed, epochs)
    weights = torch.tensor([pair.get("weight", 1.0) for pair in kept], device=device())
    say(f"reward model: {how_many(len(kept), len(pairs))}, {len(steps)} steps of {batch}")
    log(pairs=len(kept), pairs_dropped=len(pairs) - len(kept))

    model = models.load_reward(folder, True, fresh_head, seed)
    check_context(rows, model, folder)
    model = training.shard(Rewards(model), recompute)

    def loss(numbers):
        # (2B,) -> (B, 2): `pair_rows` laid a pair's two answers next to each other
        chosen, rejected = model(collate([rows[i] for i in numbers], device())).view(-1, 2).T
        losses = bradley_terry_loss(chosen, rejected, [kept[i] for i in numbers])
        return losses * weights[numbers], {
            "accuracy": (chosen > rejected).float(), "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2}

    for _ in training.optimise(model, steps, loss, lr=lr, log=log,
                               shown="margin {margin:+.4f}  accuracy {accuracy:.3f}  "):
        pass  # nothing is saved on the way
    return model

@torch.inference_mode()
def score_answers(model, tokenizer, prompt_answers, score_batch):
    """[(prompt, [answers])] -> [[reward]], `score_batch` prompts in a forward pass, like lengths together."""
    rows = [pack([encode_chat(tokenizer, prompt, answer, whole=True) for answer in answers])
            for prompt, answers in prompt_answers]
    check_context(rows, model.model, tokenizer.name_or_path, "sample with a smaller --max_new_tokens")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    rewards = [None] * len(rows)
    for at in range(0, len(order), score_batch):
        some = order[at:at + score_batch]
        values = model(collate([rows[i] for i in some], device()))
        for i, mine in zip(some, values.split([len(rows[i].branches) for i in some])):
            rewards[i] = mine.tolist()
            if not np.isfinite(rewards[i]).all():
                raise Problem(f"{tokenizer.name_or_path} gives the rewards {rewards[i]} to the answers to "
                              f"{str(prompt_answers[i][0])[:60]!r}")
    return rewards

def load(folder):
    """(model, tokenizer) to score with, whole in every process."""
    return Rewards(replicate(models.load_reward(folder))), load_tokenizer(folder)

def score(folder, samples, path, score_batch):
    """samples: rows with prompt and response, a prompt's next to each other -> the same rows with `score` and
    `rm`, in the file `path`."""
    model, tokenizer = load(folder)

    def work(block):
        groups = list(by_prompt(block))
        rewards = score_answers(model, tokenizer, [
            (group[0]["prompt"], [row["response"] for row in group]) for group in groups], score_batch)
        for row, reward in zip(block, chain.from_iterable(rewards)):
            yield {**row, "score": reward, "rm": str(folder)}

    per_prompt = len(next(by_prompt(samples)))
    run.in_blocks(samples, 64 * per_prompt, path, work, f"scoring {Path(path).stem}")

def sample_and_score(o, policy, rm, prompts, samples, seed, path, judge=None):
    """`samples` responses of a policy to every prompt, with their `score`, in the file `path`.

    o: options with temperature, top_p, max_new_tokens, sample_batch and score_batch. judge: what scores in
    the place of `score`, with its arguments.
    """
    raw = path.with_name(f"{path.stem}.unscored.jsonl")  # is there, if scoring was interrupted
    if not run.exists(raw):
        sample(policy, prompts, raw, samples=samples, temperature=o.temperature, top_p=o.top_p,
               max_new_tokens=o.max_new_tokens, rows=o.sample_batch, seed=seed)
    (judge or score)(rm, read_jsonl(raw), path, o.score_batch)
    run.remove(raw)

@dataclass
class Options:
    model: str = option(help="reward model, or a causal LM to give a head to: a folder or hub id")
    out: str = option(help="folder of the trained reward model, or the scored samples.jsonl")
    pairs: str = option("", "to train: preference pairs (prompt, chosen, rejected, perhaps weight)")
    samples: str = option("", "to score: rows with prompt and response")
    lr: float = option(2e-6)
    batch: int = option(512, "pairs per optimiser step, over all processes")
    epochs: int = option(1)
    micro_batch: int = option(2, "pairs (scoring: prompts) per forward pass and process")
    max_length: int = option(2048, "tokens of prompt and answer; longer pairs are left out")
    seed: int = option(0)
    recompute: bool = option(torch.cuda.is_available(), "recompute activations: slower, less memory")
    overwrite: bool = option(False, "begin anew, if --out is an earlier result")

def main():
    o = run.parse(Options)
    if bool(o.pairs) == bool(o.samples):
        raise Problem("give --pairs to train or --samples to score")
    folder, out = models.local_folder(o.model), Path(o.out)
    rows = read_samples(o.samples, "response") if o.samples else read_pairs(o.pairs)
    run.claim(out, o, file=bool(o.samples))
    if o.samples and not run.exists(out):
        score(folder, rows, out, o.micro_batch)
    elif o.pairs and not run.exists(out / "config.json"):
        settings = {k: v for k, v in vars(o).items() if k not in (
            "model", "out", "pairs", "samples", "overwrite")}
        log = run.open_log(out / "metrics.jsonl", "reward")
        models.save(train(folder, rows, **settings, fresh_head=True, log=log), folder, out)
    say(f"{out} is complete")

if __name__ == "__main__":
    run.launch(main)

"""Train a reward model on preference pairs by Bradley-Terry, or score samples with one.

    python reward.py --model MODEL --pairs train.jsonl --out runs/rm
    python reward.py --model runs/rm --samples samples.jsonl --out scored.jsonl

The reward of a response is the logit that the model's head gives to the last token of the chat. Training can
start from a reward model, or from a causal LM, which then gets a new head. reward.py and dpo.py are twins.

Left out on purpose: margins and centring in the loss, heads with several labels.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import models, run, training
from common.data import Problem, by_prompt, load_tokenizer, read_jsonl, read_pairs, read_samples
from common.packing import check_context, collate, hidden_states, how_many, pair_rows, whole_chats
from common.parallel import device, replicate, say
from common.probe import verify
from common.run import option
from sampler import sample

def bradley_terry_loss(chosen_rewards, rejected_rewards, pairs=None):
    """−log σ(r(x, y_w) − r(x, y_l)), (B,) and (B,) -> (B,) (arXiv 2506.06292, M-step; Bradley & Terry 1952).

    pairs: their rows, for a loss that needs more fields. As in `dpo_loss` they are one micro-batch."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)

class Rewards(torch.nn.Module):
    """A sequence classifier as a function from packed rows (packing.collate) to rewards, (answers,)."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, packed):
        verify(self.model)
        last = hidden_states(self.model, packed)[packed["last"]].float()  # (answers, H)
        return F.linear(last, self.model.score.weight.float()).squeeze(-1).clone()  # FSDP warns about views

def train(folder, pairs, *, lr, batch, micro_batch, max_length, epochs=1, seed=0, recompute=False,
          fresh_head=False, log):
    """Train the model in `folder` by Bradley-Terry and return it, for the caller to save. pairs: rows with
    prompt, chosen and rejected. A `weight` multiplies the pair's loss. fresh_head: a causal LM gets one."""
    rows, kept = pair_rows(load_tokenizer(folder), pairs, max_length)
    steps = training.steps_of([len(row) for row in rows], batch, micro_batch, seed, epochs)
    weights = torch.tensor([pair.get("weight", 1.0) for pair in kept], device=device())
    say(f"reward model: {how_many(len(kept), len(pairs))}, {len(steps)} steps of {batch}")
    log(pairs=len(kept), pairs_dropped=len(pairs) - len(kept))

    model = models.load_reward(folder, True, fresh_head, seed)
    check_context(rows, model, folder)
    model = training.shard(Rewards(model), recompute)

    def loss(numbers):
        # (2B,) -> (B, 2): the two answers of a pair stand next to each other (packing.pair_rows).
        chosen, rejected = model(collate([rows[i] for i in numbers], device())).view(-1, 2).T
        losses = bradley_terry_loss(chosen, rejected, [kept[i] for i in numbers])
        return losses * weights[numbers], {
            "accuracy": (chosen > rejected).float(), "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2}

    list(training.optimise(model, steps, loss, lr=lr, log=log,  # all steps, without a checkpoint on the way
                           shown="margin {margin:+.4f}  accuracy {accuracy:.3f}  "))
    return model

@torch.inference_mode()
def score_answers(model, tokenizer, prompt_answers, score_batch):
    """[(prompt, [answer, …])] -> [[reward, …]]. A forward pass has `score_batch` prompts of like length."""
    rows = [whole_chats(tokenizer, prompt, answers) for prompt, answers in prompt_answers]
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
    """Return (model, tokenizer) to score with. Every process has the whole model."""
    return Rewards(replicate(models.load_reward(folder))), load_tokenizer(folder)

def score(folder, samples, path, score_batch, judge=None):
    """Write the samples to the file `path`, with the reward as `score` and the model's folder as `rm`.

    samples: rows with prompt and response; those of one prompt stand next to each other. judge: a function
    (prompt, its rows) -> scores. It finds the rewards in the rows, as `score`, and its scores replace them.
    """
    model, tokenizer = load(folder)

    def work(block):
        groups = list(by_prompt(block))
        rewards = score_answers(model, tokenizer, [
            (group[0]["prompt"], [row["response"] for row in group]) for group in groups], score_batch)
        for group, scores in zip(groups, rewards):
            rows = [row | {"score": score, "rm": str(folder)} for row, score in zip(group, scores)]
            scores = judge(rows[0]["prompt"], rows) if judge else scores
            yield from (row | {"score": float(score)} for row, score in zip(rows, scores, strict=True))

    per_prompt = len(next(by_prompt(samples)))
    run.in_blocks(samples, 64 * per_prompt, path, work, f"scoring {Path(path).stem}")

def sample_and_score(o, policy, rm, prompts, samples, seed, path, judge=None):
    """Write `samples` responses of a policy to each prompt, with their `score`, to the file `path`.

    o: options with temperature, top_p, max_new_tokens, sample_batch and score_batch. judge: see `score`."""
    raw = path.with_name(f"{path.stem}.unscored.jsonl")  # exists already if scoring was interrupted
    if not run.exists(raw):
        sample(policy, prompts, raw, samples=samples, temperature=o.temperature, top_p=o.top_p,
               max_new_tokens=o.max_new_tokens, rows=o.sample_batch, seed=seed)
    score(rm, read_jsonl(raw), path, o.score_batch, judge)
    run.remove(raw)

@dataclass
class Options:
    model: str = option(help="folder or hub id of a reward model or, to train, of a causal LM")
    out: str = option(help="to train: the new folder; to score: the new JSONL file")
    pairs: str = option("", "to train: pairs with prompt, chosen, rejected and, optionally, weight")
    samples: str = option("", "to score: rows with prompt and response")
    lr: float = option(2e-6)
    batch: int = option(512, "pairs per optimiser step, over all processes")
    epochs: int = option(1)
    micro_batch: int = option(2, "pairs, or prompts to score, per forward pass and process")
    max_length: int = option(2048, "leave out pairs whose prompt and answer have more tokens")
    seed: int = option(0)
    recompute: bool = option(torch.cuda.is_available(), "recompute activations: slower, less memory")
    overwrite: bool = option(False, "delete the result that --out holds and start again")

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

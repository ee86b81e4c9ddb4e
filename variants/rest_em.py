"""ReST^EM (arXiv 2312.06585, algorithm 1): supervised training on the best samples, from the base each time.

    torchrun -m variants.rest_em --rounds 3

kept = the samples with a reward above their prompt's mean, at most 10 of a prompt, the highest first
L = −mean over the tokens of kept responses of log π(y_t | x, y_<t), π starting from π_0; fixed reward model

A row of pairs.jsonl is a kept response, `chosen`; `rejected` is the prompt's worst, for people to read. With
a verifier as the reward model set THRESHOLD = 1.

Different from the source: M is the run's (the source samples 32 or 64: --samples 32) and the epochs are
fixed, where the source stops by validation reward; model selection picks a checkpoint by its win rate against
the base policy. The mean is over tokens, the source's over responses.
"""
import numpy as np

import dpo
import filter
import mt
from common import run, training
from common.data import by_prompt, encode_chat, load_tokenizer
from common.packing import collate, pack
from common.parallel import Problem, device, say

THRESHOLD = None     # the lowest reward that is kept; None: above the prompt's mean
MOST = 10            # kept responses of a prompt
EPOCHS = 1
LEARNING_RATE = 10   # in units of --policy_lr, which is DPO's

train_and_select = mt.train_and_select

def best_samples(samples):
    """In the place of filter.preference_pairs; a prompt's samples stand next to each other."""
    rows, without = [], 0
    for group in by_prompt(samples):
        scores = np.array([row["score"] for row in group])
        above = (scores > scores.mean()) & (scores > scores.min())  # equal numbers may have a mean below them
        passed = above if THRESHOLD is None else scores >= THRESHOLD
        kept = [int(i) for i in np.argsort(-scores, kind="stable") if passed[i]][:MOST]
        reason = f"chosen: kept, one of {len(kept)}; rejected: lowest of {len(scores)}"
        rows += [filter.pair_of(group, i, int(scores.argmin()), reason) for i in kept]
        without += not kept
    return rows, without

def supervised(folder, pairs, *, lr, batch, micro_batch, max_length, seed, recompute, log, beta=None):
    """In the place of dpo.train, which has a β."""
    tokenizer = load_tokenizer(folder)
    chats = [encode_chat(tokenizer, row["prompt"], row["chosen"], row["chosen_finished"]) for row in pairs]
    rows = [pack([chat]) for chat in chats if chat.start < len(chat.ids) <= max_length]
    if not rows:
        raise Problem(f"none of {len(pairs)} responses is short enough for --max_length {max_length}")
    policy = dpo.load(folder, rows, recompute)
    tokens = [len(row.branches[0]) for row in rows]
    steps = training.steps_of([len(row) for row in rows], batch, micro_batch, seed, EPOCHS, tokens)
    dropped = len(pairs) - len(rows)
    say(f"supervised: {len(rows)} responses ({dropped} too long), {len(steps)} steps of {batch}")
    log(responses=len(rows), responses_dropped=dropped)

    def loss(numbers):
        return -policy(collate([rows[i] for i in numbers], device())), {}

    for number in training.optimise(policy, steps, loss, lr=LEARNING_RATE * lr, log=log):
        yield number, len(steps), policy

def from_base(o, policy, *others, **more):
    """DPO's start, and what checkpoints must win against."""
    return train_and_select(o, o.policy, *others, **more)

if __name__ == "__main__":
    filter.preference_pairs, dpo.train, mt.train_and_select = best_samples, supervised, from_base
    run.launch(mt.main, update_rm=False)

"""ReST^EM (arXiv 2312.06585, algorithm 1): supervised training on the best samples, from the base each time.

    torchrun -m variants.rest_em --rounds 3

Mutual-Taught goes on training the policy in use, by DPO on one pair per prompt. Here each E-step trains the
base policy π_0 anew, on those samples of the policy in use whose reward is above the mean of their prompt, at
most the 10 best of a prompt. The reward model is fixed.

    L = −mean of log π(y_t | x, y_<t) over all tokens of these samples

Each row of pairs.jsonl has one of these samples as `chosen`. Its `rejected`, the worst sample of the prompt,
is there for people to read. If the reward model is a verifier that gives 0 or 1, set THRESHOLD = 1.

Different from the source: M is the run's (the source samples 32 or 64; give --samples 32). The number of
epochs is fixed, where the source stops by the validation reward. Model selection picks a checkpoint by its
win rate against the base policy. The mean is over tokens, the source's over responses.
"""
import numpy as np

import dpo
import filter
import mt
from common import run, training
from common.data import by_prompt, encode_chat, load_tokenizer, response_ids
from common.packing import collate, row_of
from common.parallel import Problem, device, say

THRESHOLD = None     # samples with at least this reward are kept; None: those above the prompt's mean
MOST = 10            # samples kept of a prompt
EPOCHS = 1
LEARNING_RATE = 10   # times --policy_lr, which is meant for DPO

train_and_select = mt.train_and_select

def best_samples(samples):
    """Takes the place of filter.preference_pairs. The samples of a prompt must stand next to each other."""
    rows, without = [], 0
    for group in by_prompt(samples):
        scores = np.array([row["score"] for row in group])
        above = (scores > scores.mean()) & (scores > scores.min())  # a mean of equals may be rounded down
        passed = above if THRESHOLD is None else scores >= THRESHOLD
        kept = [int(i) for i in np.argsort(-scores, kind="stable") if passed[i]][:MOST]
        reason = f"chosen: kept, one of {len(kept)}; rejected: lowest of {len(scores)}"
        rows += [filter.pair_of(group, i, int(scores.argmin()), reason) for i in kept]
        without += not kept
    return rows, without

def supervised(folder, pairs, *, lr, batch, micro_batch, max_length, seed, recompute, log, beta=None):
    """Takes the place of dpo.train, and so has its β among the arguments, unused."""
    tokenizer = load_tokenizer(folder)
    rows = [row_of(encode_chat(tokenizer, pair["prompt"]), [response_ids(tokenizer, pair, "chosen")])
            for pair in pairs]
    rows = [row for row in rows if row.branches[0] and len(row) <= max_length]
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

def train_from_base(o, policy, *others, **more):
    """Train from the base policy, which is also what the checkpoints must win against."""
    return train_and_select(o, o.policy, *others, **more)

if __name__ == "__main__":
    filter.preference_pairs, dpo.train, mt.train_and_select = best_samples, supervised, train_from_base
    run.launch(mt.main, update_rm=False)

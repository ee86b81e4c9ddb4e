"""The E-step's ceiling: gold in the place of the reward model. For the embedded task, which has a gold.

    torchrun -m variants.gold_ranks --rounds 3

What the policy could gain by a reward model without errors: gold ranks samples and judges checkpoints.
"""
from functools import partial

import mt
from common import run, toy

def judge(rm, samples, path, score_batch):
    run.write_rows(path, [row | {"score": toy.gold_of(row), "rm": "gold"} for row in samples])

if __name__ == "__main__":
    mt.e_step = partial(mt.e_step, judge=judge)
    run.launch(mt.main, update_rm=False)

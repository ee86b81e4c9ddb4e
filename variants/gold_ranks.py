"""What E-steps gain from a reward model without errors: gold in its place. For the embedded task only.

    torchrun -m variants.gold_ranks --rounds 3

Gold, the embedded task's judge, ranks the samples and selects the checkpoints, and there are no M-steps. So
the run shows what the policy could gain from a reward model without errors.
"""
from functools import partial

import mt
from common import run, toy

def judge(prompt, rows):
    return [toy.gold_of(row) for row in rows]

if __name__ == "__main__":
    mt.e_step = partial(mt.e_step, judge=judge)
    run.launch(mt.main, update_rm=False)

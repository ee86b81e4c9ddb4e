"""Clipped: the samples are ranked by r_0 and, where r_0 is unsure, by what the M-step has added to it.

    torchrun -m variants.clipped_reward --rounds 3

An M-step can make the reward model forget what the base reward model r_0 knows. Here a sample's reward is

    r_0(x, y) + clip(d(y) − mean d, −σ, σ), with d(y) = r(x, y) − r_0(x, y)

where the mean of d and the standard deviation σ of r_0 are over the samples of a prompt. With one answer to a
prompt, as in model selection, this is r_0. The M-step filters its comparisons by r.
"""
from functools import cache, partial

import numpy as np

import mt
import reward
from common import run

e_step, load = mt.e_step, cache(reward.load)  # r_0 stays loaded

def judge(o, prompt, rows):
    base, = np.array(reward.score_answers(*load(o.rm), [(prompt, [row["response"] for row in rows])], 1))
    added = [row["score"] for row in rows] - base
    return base + np.clip(added - added.mean(), -base.std(), base.std())

if __name__ == "__main__":
    mt.e_step = lambda o, *paths: e_step(o, *paths, judge=partial(judge, o))
    run.launch(mt.main)

"""Online DPO (arXiv 2405.07863, section 3.2): the highest reward is chosen, the lowest is rejected.

    torchrun -m variants.online_dpo --rounds 3

Mutual-Taught chooses the shortest of the responses above the mean reward. Here length does not count:

    y_w = argmax r(x, y_i), y_l = argmin r(x, y_i), over the samples y_i of a prompt

Different from the source: the reference is the policy before the E-step. (dpo_fixed_reference.py has the
source's, π_0.) M-steps train the reward model, unless you give --update_rm false.
"""
import numpy as np

import filter
import mt
from common import run

def best_and_worst(scores, lengths):
    """Takes the place of filter.choose_pair."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    why = f"chosen: highest of {len(scores)}; rejected: lowest"
    return (best, worst, why) if scores[best] > scores[worst] else None

if __name__ == "__main__":
    filter.choose_pair = best_and_worst
    run.launch(mt.main)

"""Online DPO (arXiv 2405.07863, section 3.2): the highest reward is chosen, the lowest rejected.

    torchrun -m variants.online_dpo --rounds 3

y_w = argmax r(x, y_i), y_l = argmin r(x, y_i) of a prompt's samples, however long they are.

Different from the source: the reference is the policy before the E-step and not π_0 (that is
dpo_fixed_reference.py), and M-steps train the reward model, unless --update_rm false says otherwise.
"""
import numpy as np

import filter
import mt
from common import run

def best_and_worst(scores, lengths):
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    why = f"chosen: highest of {len(scores)}; rejected: lowest"
    return (best, worst, why) if scores[best] > scores[worst] else None

if __name__ == "__main__":
    filter.choose_pair = best_and_worst
    run.launch(mt.main)

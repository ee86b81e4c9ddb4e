"""DPO with the base policy as the reference of every E-step, as Online-RLHF has it (arXiv 2405.07863).

    torchrun -m variants.dpo_fixed_reference --rounds 3

L = −log σ(β[(log π(y_w|x) − log π_0(y_w|x)) − (log π(y_l|x) − log π_0(y_l|x))]), π starting from π_{t−1}:
β holds the policy to π_0, not each step to the one before.

Different from the source: pairs, M-steps and model selection are Mutual-Taught's.
"""
from functools import partial

import dpo
import mt
from common import run

train, train_policy = dpo.train, mt.train_policy

def against_base(o, policy, pairs, path):
    dpo.train = partial(train, reference=o.policy)
    return train_policy(o, policy, pairs, path)

if __name__ == "__main__":
    mt.train_policy = against_base
    run.launch(mt.main)

"""DPO with the base policy as the reference of every E-step, as in Online-RLHF (arXiv 2405.07863).

    torchrun -m variants.dpo_fixed_reference --rounds 3

In Mutual-Taught the reference is the policy before the E-step, so β limits each step, and the policy may move
further from the base policy π_0 in every round. Here the reference is always π_0, so β limits the distance to
π_0. Training still starts from π_{t−1}.

    L = −log σ(β[(log π(y_w|x) − log π_0(y_w|x)) − (log π(y_l|x) − log π_0(y_l|x))])

Different from the source: pairs, M-steps and model selection are Mutual-Taught's.
"""
from functools import partial

import dpo
import mt
from common import run

train, train_policy = dpo.train, mt.train_policy

def train_against_base(o, policy, pairs, path):
    dpo.train = partial(train, reference=o.policy)
    return train_policy(o, policy, pairs, path)

if __name__ == "__main__":
    mt.train_policy = train_against_base
    run.launch(mt.main)

"""DPO's reference is an average of all policies so far, as in WARP (arXiv 2406.16768, section 3.1).

    torchrun -m variants.ema_reference --rounds 3

In Mutual-Taught the reference of an E-step is the policy before it, so the policy may drift a little further
in each step. Here it is the exponential moving average of the weights of the policies before the step:

    θ_ref ← DECAY · θ_ref + (1 − DECAY) · θ_{t−1}, which begins with θ_0

Different from the source: there the average moves with every optimiser step of reinforcement learning.
"""
import shutil
from functools import partial

from huggingface_hub import save_torch_state_dict

import dpo
import mt
from common import run
from common.data import Problem
from common.models import weights_of

DECAY = 0.5
train, e_step, references = dpo.train, mt.e_step, []

def average(folders, shares, out):
    """Write the folder `out`, a model with the weights Σ shares[i] · weights of folders[i], added up in fp32
    and rounded to the last folder's precision. All else is the last folder's. For one process."""
    mean = {}
    for folder, share in zip(folders, shares):
        weights = weights_of(folder)
        if mean and mean.keys() != weights.keys():
            raise Problem(f"{folder}: its weights have other names than those of {folders[0]}")
        mean = {name: mean.get(name, 0) + share * w.float() for name, w in weights.items()}
    shutil.copytree(folders[-1], out, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    save_torch_state_dict({name: w.to(weights[name].dtype) for name, w in mean.items()}, out)

@run.phase
def move_average(o, reference, policy, path):
    with run.writing(path) as temporary:
        run.on_rank0(average, [reference, policy], [DECAY, 1 - DECAY], temporary)

def e_step_with_average(o, policy, rm, prompts, folder):
    before = references[-1] if references else o.policy
    references.append(move_average(o, before, policy, folder / "reference"))
    dpo.train = partial(train, reference=references[-1])
    return e_step(o, policy, rm, prompts, folder)

if __name__ == "__main__":
    mt.e_step = e_step_with_average
    run.launch(mt.main)

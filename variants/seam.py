"""SEAM (arXiv 2406.07971): comparisons on which policy and reward model disagree are dropped.

    torchrun -m variants.seam --rounds 3

Of the comparisons that pass Mutual-Taught's margin filter those are kept on which both models order the two
answers alike, that is, where Δr and Δπ have the same sign:

    Δr = r(new) − r(old)
    Δπ = log π_t/π_{t−1}(new) − log π_t/π_{t−1}(old), the margin of the policy's own DPO rewards, without β

Different from the source: the paper measures disagreement on answers that were made worse on purpose, and
drops prompts from reinforcement learning. Here it is measured as in `eval.py agreement`, but on the
comparisons of the M-step instead of the pairs of the E-step.
"""
import numpy as np

import mt
from common import run
from common.data import read_jsonl
from variants.ocrm import write_logps

mix = mt.mix

def policy_margins(logps):
    """Log-probabilities (N, 2 policies, 2 answers), π_t and the new answer first -> Δπ (N,)."""
    ratios = logps[:, 0] - logps[:, 1]
    return ratios[:, 0] - ratios[:, 1]

@run.phase
def logps_of_comparisons(o, comparisons, path):
    rows = read_jsonl(comparisons)
    sides = {"new": "chosen", "old": "rejected"}  # new_finished becomes chosen_finished, and so on
    pairs = [row | {sides[name[:3]] + name[3:]: value for name, value in row.items() if name[:3] in sides}
             for row in rows]
    write_logps(o, pairs, [rows[0]["new_policy"], rows[0]["old_policy"]], path)

@run.phase
def keep_agreed(o, logps, path):
    rows = read_jsonl(logps)
    margins = policy_margins(np.array([row["logps"] for row in rows])).tolist()
    alike = [row["margin"] * margin > 0 for row, margin in zip(rows, margins)]
    run.write_rows(path, [row | {"kept": row["kept"] and same, "policy_margin": margin}
                          for row, margin, same in zip(rows, margins, alike)])
    return f"policy and reward model order {sum(alike)} of {len(rows)} comparisons alike"

def mix_agreeing(o, comparisons, ranked, old_policy, path):
    logps = logps_of_comparisons(o, comparisons, path.with_name("logps.jsonl"))
    return mix(o, keep_agreed(o, logps, path.with_name("agreed.jsonl")), ranked, old_policy, path)

if __name__ == "__main__":
    mt.mix = mix_agreeing
    run.launch(mt.main)

"""SEAM (arXiv 2406.07971): comparisons on which policy and reward model disagree don't train the latter.

    torchrun -m variants.seam --rounds 3

After the margin filter a comparison stays where both order its answers alike: where Δr = r(new) − r(old) has
the sign of Δπ = log π_t/π_{t−1}(new) − log π_t/π_{t−1}(old), the policy's own reward (DPO's, without β). The
paper measures disagreement on answers made worse on purpose, and drops prompts from reinforcement learning;
here it is what `eval.py agreement` counts on the E-step's pairs, taken on the M-step's comparisons.
"""
import numpy as np

import mt
from common import run
from common.data import read_jsonl
from variants.ocrm import write_logps

mix = mt.mix

def policy_margins(logps):
    """(N, 2, 2): by π_t and by π_{t−1}, of the new and of the old answer -> Δπ (N,)."""
    ratios = logps[:, 0] - logps[:, 1]
    return ratios[:, 0] - ratios[:, 1]

@run.phase
def logps_of_comparisons(o, comparisons, path):
    rows = read_jsonl(comparisons)
    pairs = [row | {"chosen": row["new"], "rejected": row["old"], "chosen_finished": row["new_finished"],
                    "rejected_finished": row["old_finished"]} for row in rows]
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

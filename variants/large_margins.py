"""Large margins: the new reward model trains only on comparisons with which the current one clearly agrees.

    torchrun -m variants.large_margins --rounds 3

Mutual-Taught drops a comparison if Δr ≤ −ε, and so keeps slightly negative margins. The paper's appendix also
tries to keep those with Δr > ε alone, which this variant does, and to keep all: mt.py's `--filter false`.
"""
import filter
import mt
from common import run

margin_filter = filter.margin_filter

def large_margins(new_scores, old_scores):
    _, margins, epsilon = margin_filter(new_scores, old_scores)
    return margins > epsilon, margins, epsilon

if __name__ == "__main__":
    filter.margin_filter = large_margins
    run.launch(mt.main)

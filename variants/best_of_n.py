"""Best of n: the highest reward is chosen, the lowest rejected, however long they are (arXiv 2405.07863).
    torchrun -m variants.best_of_n --rounds 1
"""
import numpy as np

import filter
import mt
import run


def best_and_worst(scores, lengths):
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    why = f"chosen: highest of {len(scores)}; rejected: lowest"
    return (best, worst, why) if scores[best] > scores[worst] else None


if __name__ == "__main__":
    filter.choose_pair = best_and_worst
    run.launch(mt.main)

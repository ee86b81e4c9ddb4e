"""The M-step's ceiling: gold orders the pairs that the reward model trains on. For the embedded task.

    torchrun -m variants.gold_labels --rounds 3

What an M-step could gain by labels without errors, on the comparisons that the filter keeps and on the
E-step's pairs. Pairs of equal gold are left out.
"""
import mt
from common import run, toy
from common.data import read_jsonl

def by_gold(row, one, other, source):
    """A pair in gold's order, or None: one and other are the names of its two texts."""
    worth = {side: toy.gold(row["prompt"], row[side], row[f"{side}_finished"]) for side in (one, other)}
    if worth[one] != worth[other]:
        better, worse = sorted(worth, key=worth.get, reverse=True)
        return dict(prompt=row["prompt"], chosen=row[better], rejected=row[worse], source=str(source))

@run.phase
def mix(o, comparisons, ranked, old_policy, path):
    pairs = [by_gold(row, "new", "old", comparisons) for row in read_jsonl(comparisons) if row["kept"]]
    pairs += [by_gold(row, "chosen", "rejected", ranked) for row in read_jsonl(ranked)]
    run.write_rows(path, [pair for pair in pairs if pair])

if __name__ == "__main__":
    mt.mix = mix
    run.launch(mt.main)

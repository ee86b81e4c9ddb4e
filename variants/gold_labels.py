"""What M-steps gain from labels without errors: gold labels their pairs. For the embedded task only.

    torchrun -m variants.gold_labels --rounds 3

Mutual-Taught's M-step guesses which answer of a pair is better. Here gold, the embedded task's judge, decides
it for the same pairs: the comparisons that the filter keeps, and the E-step's pairs. So the run shows what an
M-step could gain from labels without errors. Pairs of equal gold are left out.
"""
import mt
from common import run, toy
from common.data import read_jsonl

def by_gold(row, one, other, source):
    """The pair of texts row[one] and row[other] with the better one as `chosen`; None if gold is equal."""
    worth = {side: toy.gold(row["prompt"], row[side], row[f"{side}_finished"]) for side in (one, other)}
    if worth[one] != worth[other]:
        better, worse = sorted(worth, key=worth.get, reverse=True)
        return dict(prompt=row["prompt"], chosen=row[better], rejected=row[worse], source=str(source))

@run.phase
def mix(o, comparisons, ranked, old_policy, path):
    pairs = [by_gold(row, "new", "old", comparisons) for row in read_jsonl(comparisons)
             if row["kept"] and o.rm_pairs != "ranked"]
    pairs += [by_gold(row, "chosen", "rejected", ranked) for row in read_jsonl(ranked)
              if o.rm_pairs != "comparisons"]
    run.write_rows(path, [pair for pair in pairs if pair])

if __name__ == "__main__":
    mt.mix = mix
    run.launch(mt.main)

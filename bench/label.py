"""Label a file that --labels or --spot_check has written, by the embedded task's gold with r_0's noise.

    python mt.py --rounds 3 --labels 64 --labeller "python bench/label.py"

An example of a --labeller: it writes `chosen`, 0 or 1, into rows that have none. A judge or a form for people
takes its place.
"""
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy  # noqa: E402
from data import read_jsonl, write_jsonl  # noqa: E402


def label(row):
    """The better of `answers`, 0 or 1; the same whenever it is asked."""
    first, second = (toy.gold(row["prompt"], answer) for answer in row["answers"])
    chance = 1 / (1 + math.exp((first - second) / toy.LABEL_NOISE))  # of the second
    return int(random.Random(str(row)).random() < chance)


if __name__ == "__main__":
    rows = read_jsonl(sys.argv[1])
    for row in rows:
        if row["chosen"] is None:
            row["chosen"] = label(row)
    write_jsonl(sys.argv[1], rows)

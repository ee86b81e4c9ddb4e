"""The embedded task's base models, with a policy that can also judge in words, for Self- and Meta-Rewarding.

    judge PROMPT answer RESPONSE                                ->  score 3
    compare judge PROMPT answer RESPONSE 1 score 3 2 score 5    ->  winner 2

The policy learns to judge from demonstrations, as it learns to write. They concern the same responses as the
labels of the base reward model, two of π_0's to a prompt, and they are as noisy as these labels. The worth of
a response is toy.appeal plus Gumbel noise. Since the difference of two Gumbel noises is logistic,
P(worth_a > worth_b) is the P(a ≻ b) of toy.write_preferences. The score, 0 to 5, says into which sixth of all
worths a response falls. The winner is the score nearer to it.

variants/self_rewarding.py starts this script in the place of common/toy.py.
"""
import math
import random
from pathlib import Path

import numpy as np

from common import run, toy
from common.data import read_jsonl

JUDGE = "judge {prompt} answer {response}"
META_JUDGE = "compare {task} 1 {first} 2 {second}"
WORDS = "judge answer score compare winner 0 1 2 3 4 5".split()

def demonstrations(rows, rng):
    """π_0's answers -> (prompt, answer) of judgements, and of comparisons of two judgements."""
    worth = [toy.appeal(row) - math.log(rng.expovariate(1)) for row in rows]
    for row, score in zip(rows, np.searchsorted(np.quantile(worth, np.arange(1, 6) / 6), worth)):
        task = JUDGE.format(**row)
        yield task, f"score {score}"
        first, second = rng.sample(range(6), 2)
        nearer = abs(second - score) - abs(first - score)
        if nearer:
            yield (META_JUDGE.format(task=task, first=f"score {first}", second=f"score {second}"),
                   f"winner {1 if nearer > 0 else 2}")

def main():
    o = run.parse(toy.Options)
    out, base = Path(o.out), toy.build(o.seed)
    more = demonstrations(read_jsonl(Path(base["policy"]).with_name("answers.jsonl")), random.Random(o.seed))
    toy.write_demonstrator(toy.parts(o.seed)["demonstrations"], o.seed, out / "policy",
                           run.open_log(out / "metrics.jsonl", "base policy"), more, WORDS)
    run.link(out / "prompts.jsonl", base["prompts"])  # one process makes base models
    run.link(out / "rm", base["rm"])

if __name__ == "__main__":
    run.launch(main)

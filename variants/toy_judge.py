"""A judging skill for the embedded task's policy, learnt like its writing: from demonstrations.

    judge PROMPT answer RESPONSE                                ->  score 3
    compare judge PROMPT answer RESPONSE 1 score 3 2 score 5    ->  winner 2

The responses are those that r_0's labels are about, two of π_0's to a prompt, each with one noisy worth:
toy.appeal and Gumbel noise. Two of them differ by the logistic noise of r_0's labels: P(worth_a > worth_b) is
P(a ≻ b) in toy.write_preferences. The score, 0 to 5, is the worth's sixth among all; the winner is the score
nearer to it.
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
    """Answers -> [(prompt, answer)] of judgements and of judgements of judgements."""
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

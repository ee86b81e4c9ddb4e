"""RewardBench 2: how often a reward model finds the one right answer among four, and how it treats several
answers that are all right, in percent (arXiv 2506.01937).

    python eval.py rewardbench2 --rm runs/mt/rm --data test.parquet --json rewardbench2.json

The rules are those of the official tool, github.com/allenai/reward-bench at commit 05a9005 (run_v2.py and
utils.py). By default it cuts chats off after 2,048 tokens. Here rows that are too long are left out.
"""
import re
from dataclasses import dataclass

import numpy as np

from common.data import prompt_of, read_rows
from common.models import local_folder
from common.parallel import Problem, say
from common.run import option
from evals.rewardbench import score_chats
from evals.stats import JSON, existing, publish

TEST = "huggingface.co/datasets/allenai/reward-bench-2: the split `test`"  # where the file is published
SUBSETS = ["Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"]
FIELDS = {"subset": f"one of {', '.join(SUBSETS)}", "id": "text or, in Ties, ref:n or tied:n, each once",
          "prompt": "text", "chosen": "a list of one text or, at tied:n, of several",
          "rejected": "a list of three texts, in Ties of one or more", "num_correct": "the length of chosen"}

def read_benchmark(source):
    """Read the published file, or JSONL with its fields. Raises a Problem if a row is not as FIELDS says."""
    rows = {}
    for where, row in read_rows(source):
        subset, name, prompt, chosen, rejected, count = map(row.get, FIELDS)
        ties, tied = subset == "Ties", subset == "Ties" and str(name).startswith("tied")
        texts = [isinstance(side, list) and {*map(type, side)} == {str} for side in (chosen, rejected)]
        unfit = ("subset" if subset not in SUBSETS else
                 "id" if not isinstance(name, str) or ties and (
                     (subset, name) in rows or not re.fullmatch("(ref|tied):(0|[1-9][0-9]*)", name)) else
                 "prompt" if not isinstance(prompt, str) else
                 "chosen" if not texts[0] or (len(chosen) > 1) != tied else
                 "rejected" if not texts[1] or not ties and len(rejected) != 3 else
                 "num_correct" if type(count) is not int or count != len(chosen) else "")
        if unfit:
            raise Problem(f"{where}: `{unfit}` must be {FIELDS[unfit]}, and not {row.get(unfit)!r:.60}")
        rows[subset, name if ties else where] = row | {"prompt": prompt_of(where, row)}
    return list(rows.values())

def ties_score(rewards):
    """Return the score of Ties, from −0.01 to 1.01, or None if no n has both ref:n and tied:n (the official
    tool gives NaN then). rewards: {id: (rewards of the right answers, rewards of the wrong answers)}.

    Accuracies are over all prompts. The other terms are means over the n that have both, accurate or not.
    Where the spread is 0, the tanh term is the sign of the smaller gap, as in the official tool from a009692
    on. Before, a gap of 0 gave NaN (5822f16), or such n were left out of this term (fdc742d)."""
    gaps = {name: min(right) - max(wrong) for name, (right, wrong) in rewards.items()}
    tied, ref = ([gap > 0 for name, gap in gaps.items() if name.startswith(kind)] for kind in ("tied", "ref"))
    both = [(gap, min(gap, gaps["ref" + name[4:]]), max(rewards[name][0]) - min(rewards[name][0]))
            for name, gap in gaps.items() if name.startswith("tied") and "ref" + name[4:] in gaps]
    terms = [0.2 * (gap > spread) + 0.2 * (smaller > spread) + 0.01 * (
        np.tanh(smaller / spread - 1) if spread else np.sign(smaller)) for gap, smaller, spread in both]
    return float(0.3 * np.mean(tied) + 0.3 * np.mean(ref) + np.mean(terms)) if both else None

def rewardbench2_figures(rows, rewards):
    """Return {subset: percent} and, if all six are there, their plain mean as "Average", which is that of the
    leaderboard (app.py of the Space allenai/reward-bench at 9a9d913). rewards: for each row those of its
    answers, chosen first, or None to leave it out. If the chosen answer is one of k with the highest reward,
    the row counts 1/k, as in the official tool since fdc742d. Before, at fb0487c, it counted 1 (argmax)."""
    judged = [(row, values) for row, values in zip(rows, rewards) if values]
    hits = {s: [(v[0] == max(v)) / v.count(max(v)) for row, v in judged if row["subset"] == s]
            for s in SUBSETS[:-1]}
    figures = {s: 100 * float(np.mean(shares)) for s, shares in hits.items() if shares}
    ties = ties_score({row["id"]: (v[:row["num_correct"]], v[row["num_correct"]:])
                       for row, v in judged if row["subset"] == "Ties"})
    figures |= {} if ties is None else {"Ties": 100 * ties}
    return figures | ({"Average": sum(figures.values()) / 6} if len(figures) == 6 else {})

@dataclass
class RewardBench2:
    rm: str = option(help="folder or hub id")
    data: str = option(help="RewardBench 2: the published parquet, or JSONL with its fields")
    json: str = option("", JSON)
    score_batch: int = 8
    max_length: int = option(10**6, "rows with a longer chat, or one too long for the RM, are left out")

def rewardbench2(o):
    rows = read_benchmark(existing(o.data, TEST))
    chats = [(row["prompt"], row["chosen"] + row["rejected"]) for row in rows]
    rewards = score_chats(local_folder(o.rm), chats, o.score_batch, o.max_length, "rows")
    figures = rewardbench2_figures(rows, rewards)
    missing = [s for s in SUBSETS if s not in figures]
    say(f"{len(rows) - rewards.count(None)} rows" + f"; without {', '.join(missing)}" * bool(missing))
    publish(figures, o.json)

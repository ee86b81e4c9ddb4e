"""News: five comparisons a prompt, while labels say that the policy's update knows more than the reward model.

    torchrun -m variants.news --rounds 3        # for the embedded task only, whose labels are noisy gold

An M-step teaches log π_t/π_{t−1}. Where that orders no more of 100 labelled pairs of the new policy's answers
than the reward model in use does, there is no news, and the reward model stays.
"""
import random
from math import log

import mt
from common import run, toy
from common.data import by_prompt, read_json, read_jsonl
from evals.agreement import policy_margins
from evals.rewardbench import judge_pairs

def labelled(rows, rng):
    """Two answers to a prompt -> a pair with a label as noisy as those of toy.write_preferences."""
    rows = sorted(rows, key=lambda row: toy.gold_of(row) / toy.LABEL_NOISE - log(rng.expovariate(1)))
    return dict(prompt=rows[0]["prompt"], chosen=rows[1]["response"], rejected=rows[0]["response"])

@run.phase
def ask(o, samples, new_policy, old_policy, rm, path):
    rng = random.Random(o.seed)
    pairs = [labelled(rows[:2], rng) for rows in by_prompt(read_jsonl(samples))]
    pairs = [pair for pair in pairs if pair["chosen"] != pair["rejected"]][:100]
    right = dict(update=policy_margins(str(new_policy), str(old_policy), pairs, o.micro_batch) > 0,
                 rm=judge_pairs(str(rm), pairs, o.score_batch, o.max_length)[1])
    run.write_json(path, {name: float(values.mean()) for name, values in right.items()})

def m_step(o, old_policy, new_policy, rm, prompts, folder, ranked):
    new, old = (mt.scored_samples(o, policy, rm, prompts, folder / f"{name}.jsonl", samples=5)
                for name, policy in (("new", new_policy), ("old", old_policy)))
    found = read_json(ask(o, new, new_policy, old_policy, rm, folder / "news.json"))
    if found["update"] <= found["rm"]:
        return rm
    comparisons = mt.make_comparisons(o, new, old, folder / "comparisons.jsonl")
    return mt.train_reward(o, mt.mix(o, comparisons, ranked, old_policy, folder / "preferences.jsonl"),
                           folder / "rm")

if __name__ == "__main__":
    mt.m_step = m_step
    run.launch(mt.main, rm_batch=80)

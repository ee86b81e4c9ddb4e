"""A point of the map: the embedded task with other constants than toy.py's, from the environment.

    POINT='{"labels": 500, "taste": 1.0}' python -m bench.point --rounds 3 --seed 1 --out full

labels     pairs that r_0 learns from (toy.LABELS)
taste      nats that its labellers see in each word of a third of all adjectives and verbs, and gold doesn't
own_body   r_0 starts from another policy's body, of another seed
policy_lr  the E-step's
rule       "best": the highest reward is chosen, as in variants/online_dpo.py
restart    every E-step trains the base policy anew, on the samples of the policy in use
m_steps    so many in all; then the reward model stays
gold       labels the pairs of M-steps, as in variants/gold_labels.py
alike      M-steps have the pairs whose answers differ by a word in length at most

Base models lie in runs/point-base of the current folder, so a folder is for one point. Without --rounds, as
toy.build calls it, it makes them, and in held_out/ labels of the test prompts, from which no reward model
learns.
"""
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import filter  # noqa: E402
import mt  # noqa: E402
import reward  # noqa: E402
from common import run, toy  # noqa: E402
from variants import gold_labels  # noqa: E402
from variants.online_dpo import best_and_worst  # noqa: E402

POINT = {"labels": toy.LABELS, "taste": 0.0, "own_body": False, "policy_lr": toy.SETTINGS["policy_lr"],
         "rule": "shortest", "restart": False, "m_steps": None, "gold": False, "alike": False}
given = json.loads(os.environ.get("POINT", "{}"))
assert given.keys() <= POINT.keys(), f"POINT: {given.keys() - POINT.keys()}?"
POINT |= given
TASTY = {*sorted(toy.ADJECTIVE_MOOD)[::3], *sorted(toy.VERB_MOOD)[::3]}
appeal, train, write_demonstrator = toy.appeal, reward.train, toy.write_demonstrator
train_policy, m_step = mt.train_policy, mt.m_step

def with_taste(row):
    return appeal(row) + POINT["taste"] * sum(word in TASTY for word in row["response"].split())

def from_own_body(folder, pairs, *, seed, log, **settings):
    body = Path(folder).with_name("body")
    write_demonstrator(toy.parts(seed)["demonstrations"], seed + 1000, body, log)
    return train(str(body), pairs, seed=seed, log=log, **settings)

def from_base(o, policy, pairs, path):
    return train_policy(o, o.policy, pairs, path)

def m_step_of_first_rounds(o, old_policy, new_policy, rm, prompts, folder, ranked):
    done = int(folder.parent.name.removeprefix("round")) > POINT["m_steps"]
    return rm if done else m_step(o, old_policy, new_policy, rm, prompts, folder, ranked)

def train_on_alike(folder, pairs, **settings):
    return train(folder, [pair for pair in pairs if abs(
        len(pair["chosen"].split()) - len(pair["rejected"].split())) <= 1], **settings)

def make_base():
    o = run.parse(toy.Options)
    if POINT["own_body"]:
        reward.train = from_own_body
    toy.main()
    path = Path(o.out) / "held_out" / "preferences.jsonl"
    toy.write_preferences(Path(o.out) / "policy", toy.parts(o.seed)["test"], o.seed, path)

@dataclass
class Options(mt.Options):
    point: str = run.option(json.dumps(POINT), "for run.json, so that a folder is of one point")

def vary():
    """What a run does otherwise; its base models know nothing of it."""
    if POINT["rule"] == "best":
        filter.choose_pair = best_and_worst
    if POINT["restart"]:
        mt.train_policy = from_base
    if POINT["m_steps"]:
        mt.m_step = m_step_of_first_rounds
    if POINT["gold"]:
        mt.mix = gold_labels.mix
    if POINT["alike"]:
        reward.train = train_on_alike
    mt.main(Options, policy_lr=POINT["policy_lr"])

if __name__ == "__main__":
    toy.LABELS, toy.appeal, toy.build = POINT["labels"], with_taste, partial(toy.build, script=__file__)
    run.launch(vary if "--rounds" in sys.argv else make_base)

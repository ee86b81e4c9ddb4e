"""Run a point of the map: the embedded task with other constants, given in the environment variable POINT.

    POINT='{"labels": 500, "taste": 1.0}' python -m bench.point --rounds 3 --seed 1 --out full

labels     how many pairs r_0 learns from (toy.LABELS)
taste      nats by which r_0's labellers, but not gold, like each word of a third of all adjectives and verbs
own_body   true: r_0 starts from the body of another policy, which was trained with another seed
policy_lr  the learning rate of the E-step
rule       "best": the highest reward is chosen, as in variants/online_dpo.py
restart    true: every E-step trains the base policy anew, on the samples of the policy in use
m_steps    how many rounds have an M-step; after them the reward model stays
gold       true: gold labels the pairs of the M-step, as in variants/gold_labels.py
alike      true: the M-step has only the pairs whose answers differ in length by at most one word

The base models are made in runs/point-base of the current folder, so a folder is for one point. Without
--rounds this script makes them, which is how toy.build calls it. It also labels answers to the test prompts,
in held_out/; no reward model learns from these.
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
assert given.keys() <= POINT.keys(), f"POINT has unknown constants: {given.keys() - POINT.keys()}"
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
    point: str = run.option(json.dumps(POINT), "recorded in run.json, so that a run has one point only")

def run_point():
    """Run mt.py with the constants that concern the run. Those of the base models are set below."""
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
    run.launch(run_point if "--rounds" in sys.argv else make_base)

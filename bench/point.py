"""A point of the map: the embedded task with other constants than toy.py's, from the environment.

    POINT='{"labels": 500, "taste": 1.0}' python -m bench.point --rounds 3 --seed 1 --out full

labels     pairs that r_0 learns from (toy.LABELS)
taste      nats that its labellers see in each word of a third of all adjectives and verbs, and gold doesn't
own_body   r_0 starts from another policy's body, of another seed
policy_lr  the E-step's
rule       "best": the highest reward is chosen, as in variants/online_dpo.py
choose     "random": --labels asks about pairs that are drawn, not about those which the RM is least sure of
restart    every E-step trains the base policy anew, on the samples of the policy in use
m_steps    so many in all; then the reward model stays
gold       labels the pairs of M-steps, as in variants/gold_labels.py
alike      M-steps have the pairs whose answers differ by a word in length at most

Base models lie in runs/point-base of the current folder, so a folder is for one point. Without --rounds, as
toy.build calls it, it makes them, and labels that no reward model learns from: of the test prompts in
held_out/, of up to 3,000 others in more/ (the base policy may know demonstrations of those).
"""
import json
import os
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import filter  # noqa: E402
import labels  # noqa: E402
import mt  # noqa: E402
import reward  # noqa: E402
import run  # noqa: E402
import toy  # noqa: E402
from data import by_prompt  # noqa: E402
from variants import gold_labels  # noqa: E402
from variants.online_dpo import best_and_worst  # noqa: E402

POINT = {"labels": toy.LABELS, "taste": 0.0, "own_body": False, "policy_lr": toy.SETTINGS["policy_lr"],
         "rule": "shortest", "choose": "unsure", "restart": False, "m_steps": None,
         "gold": False, "alike": False}
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


def drawn(samples, count):
    """In the place of labels.unsure: two different answers to each of `count` prompts, drawn."""
    found = []
    for group in by_prompt(samples):
        answers = sorted({row["response"] for row in group})
        if len(answers) > 1:
            found.append((group[0]["prompt"], answers))
    draw = random.Random(len(found))
    found = draw.sample(found, min(count, len(found)))
    return [(prompt, draw.sample(answers, 2)) for prompt, answers in found]


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
    cut = toy.parts(o.seed)
    known = {*cut["loop"], *cut["test"], *cut["labels"]}
    more = [prompt for prompt in toy.all_prompts() if prompt not in known]
    random.Random(o.seed).shuffle(more)
    for name, prompts in {"held_out": cut["test"], "more": more[:3000]}.items():
        path = Path(o.out) / name / "preferences.jsonl"
        toy.write_preferences(path.parents[1] / "policy", prompts, o.seed, path)


@dataclass
class Options(mt.Options):
    point: str = run.option(json.dumps(POINT), "for run.json, so that a folder is of one point")


def vary():
    """What a run does otherwise; its base models know nothing of it."""
    if POINT["rule"] == "best":
        filter.choose_pair = best_and_worst
    if POINT["choose"] == "random":
        labels.unsure = drawn
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

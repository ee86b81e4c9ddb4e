"""An ensemble of reward models, whose reward is lower where its members disagree (arXiv 2310.02743).

    torchrun -m variants.ensemble --rounds 3
    torchrun -m variants.ensemble --policy … --rm RM --others RM2 RM3 --prompts …

Mutual-Taught believes one reward model. Here several judge each response, in the E-step, in model selection
and in the M-step's filter, and its score is r = mean_k r_k − λ · std_k r_k, or min_k r_k. An M-step trains
every member, from its own base reward model and on the pairs in an order of its own. The embedded task's base
reward models learn the same labels from different seeds, as the paper's do; otherwise --others names them.
Bradley-Terry leaves open where the zero of a reward lies, so the members are made comparable first: zero is
each member's mean reward for the first samples that it judges (zeros.json). The link OUT/rm shows the first
member.

Different from the source: the paper subtracts λ times the variance, not the standard deviation.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import mt
import reward
from common import models, run, toy
from common.data import read_json, read_jsonl, read_pairs
from common.parallel import Problem, rank

K = 3         # members, in the embedded task
LAMBDA = 1.0  # None: take the lowest reward
mutual_taught, train_reward, score = mt.mutual_taught, mt.train_reward, reward.score

@dataclass
class Options(mt.Options):
    others: list[str] = run.option(None, "the other members' base reward models: folders or hub ids")

def combine(rewards):
    """The members' rewards (K, N) -> the ensemble's (N,)."""
    return rewards.min(0) if LAMBDA is None else rewards.mean(0) - LAMBDA * rewards.std(0)

def members(rm):
    """The folders of an ensemble's members: `rm` itself, and rm1, rm2, … beside it."""
    return [str(rm), *map(str, sorted(Path(rm).parent.glob("rm[1-9]*")))]

def score_by_all(rm, samples, path, score_batch, judge=None):
    """Takes the place of reward.score: `score` is the ensemble's reward, `members` has each member's."""
    if len(members(rm)) == 1:  # a reward model that belongs to no ensemble
        return score(rm, samples, path, score_batch, judge)
    files = [path.with_name(f"{path.stem}.{Path(member).name}.jsonl") for member in members(rm)]
    for member, file in zip(members(rm), files):
        if not run.exists(file):
            score(member, samples, file, score_batch)
    rewards = np.array([[row["score"] for row in read_jsonl(file)] for file in files])
    zeros = Path(rm).with_name("zeros.json")
    if not run.exists(zeros):
        run.write_json(zeros, {"zeros": rewards.mean(1).tolist()})
    rewards -= np.array(read_json(zeros)["zeros"])[:, None]
    run.write_rows(path, [row | {"score": score, "rm": str(rm), "members": each} for row, score, each in zip(
        samples, combine(rewards).tolist(), rewards.T.tolist())])
    run.remove(*files)

def make_base(o):
    """Make the base ensemble OUT/base/rm, rm1, …, and return its first folder. The members are links to --rm
    and --others; without --others all but the first are trained on the embedded task's labels."""
    base, labels = Path(o.out) / "base", Path(o.rm).with_name("preferences.jsonl")
    folders = [o.rm, *map(models.local_folder, o.others or [])]
    if not (o.others or labels.exists()):
        raise Problem("an ensemble needs more than --rm: name the other reward models by --others")
    if rank() == 0:
        base.mkdir(exist_ok=True)
    for k, folder in enumerate(folders):
        models.check_reward(folder)
        run.on_rank0(run.link, base / f"rm{k or ''}", folder)
    for k in [] if o.others else range(1, K):
        train_base(o, base / f"rm{k}", labels=labels, seed=o.seed + k)
    return str(base / "rm")

@run.phase
def train_base(o, path, labels, seed):
    """Train a base reward model as toy.py trained the first one, but from another seed."""
    with run.writing(path) as temporary:
        models.save(reward.train(
            o.policy, read_pairs(labels), seed=seed, fresh_head=True, max_length=o.max_length,
            log=run.log_of(o, path), **toy.RM), o.policy, temporary)

def train_members(o, preferences, path):
    """Train each member from its own base; the first one last, since `path`, its folder, ends the M-step."""
    if not run.exists(path):
        run.remove(path.with_name("zeros.json"))
    for k, base in reversed([*enumerate(members(o.rm))]):
        train_reward(replace(o, rm=base, seed=o.seed + k), preferences, path.with_name(Path(base).name))
    return str(path)

if __name__ == "__main__":
    mt.mutual_taught, mt.train_reward = lambda o: mutual_taught(replace(o, rm=make_base(o))), train_members
    reward.score = score_by_all
    run.launch(mt.main, options=Options)

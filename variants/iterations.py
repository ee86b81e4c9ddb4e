"""The paper's order, an E-step and an M-step in each round, so that the run ends with a reward model.

    torchrun -m variants.iterations --rounds 2

Two thirds of the prompts are the policy's, in a part for each round. One third is used by every M-step.
"""
from dataclasses import dataclass, field
from pathlib import Path

import mt
from common import run
from common.data import read_jsonl
from common.parallel import Problem

@dataclass
class Options(mt.Options):
    rounds: int = run.option(2, "iterations of E, M")
    parts: int = field(init=False)  # in run.json, so that more rounds, which cut other parts, are refused

    def __post_init__(self):
        self.parts = self.rounds

@run.phase
def cut(o, prompts, path):
    rows = read_jsonl(prompts / "s0.jsonl") + read_jsonl(prompts / "s1.jsonl")
    if len(rows) < o.parts:
        raise Problem(f"--rounds {o.parts} needs as many prompts for the policy, but there are {len(rows)}")
    with run.writing(path) as temporary:
        for i in range(o.parts):
            run.write_rows(temporary / f"{i + 1}.jsonl", rows[i::o.parts])

def mutual_taught(o):
    policy, rm, prompts = o.policy, o.rm, Path(mt.split(o, Path(o.out) / "prompts"))
    parts = Path(cut(o, prompts, Path(o.out) / "parts"))
    for i in range(1, o.parts + 1):
        e, m, old_policy = Path(o.out, f"round{i}", "e1"), Path(o.out, f"round{i}", "m"), policy
        policy = mt.e_step(o, old_policy, rm, parts / f"{i}.jsonl", e)
        if not policy:  # no checkpoint was better, so the run stops
            break
        if o.update_rm:
            rm = mt.m_step(o, old_policy, policy, rm, prompts / "s2.jsonl", m, e / "pairs.jsonl")

if __name__ == "__main__":
    mt.mutual_taught = mutual_taught
    run.launch(mt.main, options=Options)

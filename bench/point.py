"""Run the embedded task in another world: with other constants of common/toy.py, in the variable WORLD.

    WORLD='{"SKILL": 0.5, "LABELLERS": "all"}' python -m bench.point --rounds 3 --seed 1 --out full

The base models of each world are made in runs/point-base of the current folder. Without --rounds this script
makes them, which is how toy.build calls it.
"""
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mt  # noqa: E402
from common import run, toy  # noqa: E402

WORLD = {"SKILL": toy.SKILL, "LABELLERS": toy.LABELLERS} | json.loads(os.environ.get("WORLD", "{}"))

@dataclass
class Options(mt.Options):
    world: str = run.option(json.dumps(WORLD), "recorded in run.json, so that a run has one world only")

if __name__ == "__main__":
    toy.SKILL, toy.LABELLERS, toy.build = *WORLD.values(), partial(toy.build, script=__file__)
    run.launch(mt.main, options=Options) if "--rounds" in sys.argv else run.launch(toy.main)

"""Anchored: as many of the base reward model's own labelled pairs in the M-step's mix as there are others.

    torchrun -m variants.anchored --rounds 3
    torchrun -m variants.anchored --policy … --rm … --prompts … --anchor labels.jsonl

After APO (arXiv 2311.08045), whose reward model trains on human labels and on new against old answers
together, so that it doesn't forget what people prefer. There policy and reward model play a min-max game;
here only the mix is taken over, and Bradley-Terry stays.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import mt
from common import run
from common.parallel import Problem
from variants import human_labels

mutual_taught = mt.mutual_taught

@dataclass
class Options(mt.Options):
    anchor: str = run.option("", "labelled pairs; none: the embedded task's, which lie beside its base RM")

def with_labels(o):
    file = o.anchor or str(Path(o.rm).with_name("preferences.jsonl"))
    if not Path(file).exists():
        raise Problem(f"{file}: no such file; --anchor FILE names the labelled pairs")
    mutual_taught(replace(o, anchor=file))

if __name__ == "__main__":
    mt.mutual_taught, mt.mix = with_labels, human_labels.mix
    run.launch(mt.main, options=Options)

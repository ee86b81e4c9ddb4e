"""Anchored: half of the pairs that the M-step trains on are labelled ones.

    torchrun -m variants.anchored --rounds 3
    torchrun -m variants.anchored --policy … --rm … --prompts … --anchor labels.jsonl

Nobody has labelled the pairs of Mutual-Taught's M-step, so the reward model that learns from them may forget
what people prefer. To N such pairs this variant adds N labelled ones, or all if there are fewer, drawn anew
in each round. They should be those that the base reward model has learnt from.

Different from the source: APO (arXiv 2311.08045) trains its reward model on human labels together with the
policy's own answers, too, but in a min-max game between the two models. Only the mix of pairs is taken over;
the loss stays Bradley-Terry's.
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
    anchor: str = run.option("", "labelled pairs; none: those that the embedded task's base RM learnt from")

def mutual_taught_with_labels(o):
    file = o.anchor or str(Path(o.rm).with_name("preferences.jsonl"))
    if not Path(file).exists():
        raise Problem(f"{file}: no such file; --anchor FILE names the labelled pairs")
    mutual_taught(replace(o, anchor=file))

if __name__ == "__main__":
    mt.mutual_taught, mt.mix = mutual_taught_with_labels, human_labels.mix
    run.launch(mt.main, options=Options)

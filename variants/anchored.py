"""Anchored: as many of the base reward model's own labelled pairs in the M-step's mix as there are others.

    torchrun -m variants.anchored --rounds 3
    torchrun -m variants.anchored --policy … --rm … --prompts … --anchor labels.jsonl

After APO (arXiv 2311.08045), whose reward model trains on human labels and on new against old answers
together, so that it doesn't forget what people prefer. There policy and reward model play a min-max game;
here only the mix is taken over, and Bradley-Terry stays. Each M-step draws the pairs anew. Those of the
embedded task lie beside its base RM.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import filter
import manifest
import mt
import run
from data import Problem, read_jsonl, read_pairs, seed_of
from run import option

mix, mutual_taught = mt.mix, mt.mutual_taught


@dataclass
class Options(mt.Options):
    anchor: str = option("", "labelled pairs: prompt, chosen, rejected; none: preferences.jsonl beside --rm")


def labels(o):
    """The labelled pairs of --anchor, as the RM trains on them."""
    source = o.anchor or Path(o.rm).with_name("preferences.jsonl")
    if not o.anchor and not source.exists():
        raise Problem(f"{source}: no such file; --anchor FILE names the labelled pairs")
    return [filter.preference(pair, "chosen", "rejected", source, None, None) for pair in read_pairs(source)]


def with_labels(o):
    labels(o)  # what is wrong with them is said now, not hours later
    mutual_taught(o)


def mix_anchored(o, comparisons, ranked, old_policy, path):
    own = mix(o, comparisons, ranked, old_policy, path.with_name("own.jsonl"))
    if manifest.due(o.out, path, own):
        rows, pool = read_jsonl(own), labels(o)
        drawn = np.random.default_rng(seed_of(o.seed, mt.phase(o, path))).permutation(len(pool))[:len(rows)]
        run.write_rows(path, rows + [pool[i] for i in drawn])
    return manifest.done(o.out, path)


if __name__ == "__main__":
    mt.mix, mt.mutual_taught = mix_anchored, with_labels
    run.launch(mt.main, options=Options)

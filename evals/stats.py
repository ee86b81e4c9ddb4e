"""Shares with their intervals, and what the commands of evals/ have in common: printing figures and writing
them as JSON.

The benchmarks' figures are in percent, as in their own tools and in the paper. Accuracies and win rates under
a reward model are shares between 0 and 1, as everywhere else in this project. All intervals are at 95%.
"""
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np

from common.parallel import Problem, say
from common.run import write_json

SIMILAR = 0.9  # two lengths are similar if the shorter is at least this share of the longer
JSON = "also write the figures to this file"  # help of --json

# ---------------------------------------------------------------- shares and intervals
def wilson(share, count):
    """Return the bounds of the interval of a share of `count` cases (Wilson 1927). Where some cases are ties
    that count a half, the interval is wider than it need be, never narrower."""
    if not count:
        return math.nan, math.nan
    z = 1.959964
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count))**2)
    low, high = (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)
    return min(low, share), max(high, share)  # rounding could leave a share of 0 or 1 outside

def bootstrap(statistic, count, draws=1000, seed=0):
    """Return the bounds of the percentile interval of statistic(rows) (Efron 1979). It is computed on `draws`
    samples, each of `count` row numbers, drawn with replacement from `count` rows."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(count, size=count)) for _ in range(draws)]
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]

def similar(lengths, others):
    """Return whether two lengths are similar, (N,) bool, for lengths (N,) and (N,) in the same unit."""
    return np.minimum(lengths, others) >= SIMILAR * np.maximum(lengths, others)

def share(hits, name):
    """Return the mean of hits (N,) under `name`, with its Wilson interval and N. A hit is 0, 1, or 1/2 for a
    tie."""
    mean = float(np.mean(hits)) if len(hits) else math.nan
    low, high = wilson(mean, len(hits))
    return {name: mean, "ci_low": low, "ci_high": high, "n": len(hits)}

def shares(hits, name, lengths, others, subsets=()):
    """Return the share of all hits (N,), the share among rows whose two lengths are similar and, given the
    rows' subsets (N,), the share of each subset."""
    hits, subsets = np.asarray(hits, float), np.array(subsets, str)
    figures = share(hits, name) | {"similar_length": share(hits[similar(lengths, others)], name)}
    if len(subsets):
        figures["subsets"] = {str(s): share(hits[subsets == s], name) for s in np.unique(subsets)}
    return figures

def means(rows, *names):
    """Return {field: its mean over the rows}."""
    return {name: float(np.mean([row[name] for row in rows])) for name in names}

def standard_error(values):
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

def ordered_alike(scores, truth):
    """Return how often `scores` and `truth` prefer the same one of two answers to a prompt, as a share. Both
    are a list of rewards per prompt. A pair of answers that are equal in `truth` doesn't count, and one with
    equal `scores` counts as wrong."""
    pairs = [(a[i] - a[j], b[i] - b[j]) for a, b in zip(scores, truth)
             for i, j in combinations(range(len(a)), 2)]
    return float(np.mean([x * y > 0 for x, y in pairs if y]))

# ---------------------------------------------------------------- files and printing
def existing(path, published):
    """Return `path`, a file that somebody else publishes. If it is missing, the Problem says where."""
    if not Path(path).exists():
        raise Problem(f"{path}: no such file; it is published at {published}")
    return path

def publish(figures, path):
    """Print {name: figure or dict of figures} as a table. With a `path`, write it there as JSON, too."""
    print_figures(figures)
    if path:
        write_json(path, json.loads(json.dumps(figures), parse_constant=lambda _: None))  # JSON has no NaN

def print_figures(figures, indent=""):
    for name, value in figures.items():
        if not isinstance(value, dict):
            say(f"{indent}{name:26}{value:.6g}")
        elif any(isinstance(inner, dict) for inner in value.values()):
            say(f"{indent}{name}")
            print_figures(value, indent + "  ")
        else:
            say(f"{indent}{name:26}" + "  ".join(f"{key} {x:.6g}" for key, x in value.items()))

"""docs/curves.png: the curves that docs/curves.md explains, of one run that goes too far and one that stops.

    torchrun mt.py --rounds 3 && torchrun mt.py --rounds 3 --tau 0.63 --out runs/stopped
    python bench/curves.py runs/toy runs/stopped
"""
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
from evals import figures, plots  # noqa: E402

run, stopped = (figures.load(folder) | {"label": ""} for folder in sys.argv[1:])
PANELS = [
    ("a  DPO loss", lambda axis: plots.plot_steps(axis, run, "E", "loss", {"loss": ""})),
    ("b  log-probabilities", lambda axis: plots.plot_steps(
        axis, run, "E", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"})),
    ("c  rewards", lambda axis: plots.plot_steps(
        axis, run, "E", "β log π/π_ref", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"})),
    ("d  RM loss", lambda axis: plots.plot_steps(axis, run, "M", "loss", {"loss": ""})),
    ("e  length", lambda axis: plots.plot_lengths(axis, run)),
    ("f  reward under RM 0", lambda axis: plots.plot_states(axis, [run], "reward_r0")),
    ("g  gold", lambda axis: plots.plot_states(axis, [run], "gold")),
    ("h  RM accuracy", lambda axis: plots.plot_accuracy(axis, run)),
    ("i  the stop", lambda axis: plots.plot_win_rates(axis, stopped))]

with matplotlib.rc_context(plots.STYLE):
    figure = Figure(figsize=(12, 9), layout="constrained", facecolor="white")
    for axis, (name, plot) in zip(figure.subplots(3, 3).flat, PANELS):
        plot(axis)
        axis.set_title(name, loc="left", pad=20, fontweight="bold")
    figure.savefig(HOME / "docs" / "curves.png", dpi=80)

"""Draws a run's curves. Each plot is a function that draws on a matplotlib axis: `draw_picture` puts three of
them into report.png, and `svg` makes one into inline SVG for the page. matplotlib is imported only where
something is drawn, so everything else works without it.
"""
import io
import re
from html import escape
from importlib.util import find_spec

import numpy as np

from evals.figures import e_steps, training_lines
from evals.stats import wilson

UNITS = {"gold": "gold on test prompts ± se", "reward_r0": "reward under RM 0 ± se"}
SERIES = ["#2f6fb5", "#c8612a", "#3c8d5a", "#8a5bb1", "#b03a5b", "#7a6a1f"]  # the page's --s0, --s1, …
INK, QUIET = "#22252b", "#8b9099"                                            # and --ink, --quiet
STYLE = {"svg.fonttype": "none", "font.size": 9.5, "text.color": INK, "text.parse_math": False,
         "axes.labelcolor": INK, "axes.edgecolor": QUIET, "axes.spines.top": False,
         "axes.spines.right": False, "xtick.color": QUIET, "xtick.labelcolor": INK, "ytick.color": QUIET,
         "ytick.labelcolor": INK, "legend.frameon": False, "legend.fontsize": 9, "lines.markersize": 4.5}
HIDDEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]")

def visible(text):
    """Replace characters that are invisible, or that reverse the writing direction, by their code points."""
    return HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)

def can_plot():
    return find_spec("matplotlib") is not None

def svg(caption, draw, salt):
    """Return what draw(axis) draws as a figure in HTML with inline SVG, or '' without matplotlib. The colours
    become the page's CSS variables, so that they follow its dark mode. matplotlib hashes the salt into the
    SVG's ids, so those of two plots with different `salt` or `caption` differ, as one page requires."""
    if not can_plot():
        return ""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{salt} {caption}"}):
        figure, file = Figure(figsize=(4.4, 2.7), layout="constrained"), io.StringIO()
        draw(figure.subplots())
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = visible(file.getvalue().partition("<svg")[2])
    text = re.sub(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", text, count=4)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for variable, colour in [*((f"s{i}", c) for i, c in enumerate(SERIES)), ("ink", INK), ("quiet", QUIET)]:
        text = text.replace(colour, f"var(--{variable})")
    return (f'<figure><figcaption>{escape(caption)}</figcaption>'
            f'<svg role="img" aria-label="{escape(caption)}"{text}</figure>')

def trend(axis, values, start=0, **look):
    """Draw values in a row, without a line if they are too few for a trend."""
    axis.plot(range(start, start + len(values)), values, marker="o" if len(values) < 10 else "",
              linestyle="-" if len(values) > 3 else "", **look)

def finish(axis, xlabel, ylabel, ticks=None):
    """Name the axes, label the ticks {x: label}, and put a legend above the plot if its lines have labels."""
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if ticks:
        axis.set_xticks(list(ticks), [str(label).removeprefix("round") for label in ticks.values()])
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1.4)

def plot_states(axis, runs, key):
    """Draw the figure `key` of the base policy and of the policy after each round, with standard errors. The
    gold of a single run is drawn with its two parts."""
    parts = ("form", "content") if key == "gold" and len(runs) == 1 else ()
    for part, colour in zip(parts, SERIES[1:]):
        trend(axis, [state[part] for state in runs[0]["states"]], color=colour, label=part)
    for run, colour in zip(runs, SERIES * len(runs)):
        values, errors = ([state[name] for state in run["states"]] for name in (key, f"{key}_se"))
        trend(axis, values, color=colour, label=run["name"] if len(runs) > 1 else key if parts else None)
        axis.errorbar(range(len(values)), values, errors, fmt="none", ecolor=colour, capsize=2)
    longest = max((run["states"] for run in runs), key=len)
    finish(axis, "policy after round", UNITS[key], {at: s["policy"] for at, s in enumerate(longest)})

def plot_win_rates(axis, run):
    """Draw each checkpoint's win rate with its 95% interval. The markers of chosen checkpoints are filled."""
    at, middles = 0, {}
    for s in e_steps(run):
        for i, (name, rate) in enumerate(s["win_rates"].items()):
            low, high = wilson(rate, s["judged"]) if s["judged"] else (rate, rate)
            axis.errorbar(at + i, rate, [[rate - low], [high - rate]], marker="o", color=SERIES[0], capsize=2,
                          markerfacecolor=SERIES[0] if name == s["chosen"] else "none")
        middles[at + (len(s["win_rates"]) - 1) / 2] = s["phase"]
        at += len(s["win_rates"]) + 1
    for tau in {s["tau"] for s in e_steps(run) if s["tau"]}:
        axis.axhline(tau, color=SERIES[1], linewidth=0.8, linestyle="--", zorder=3, label=f"τ = {tau}")
    axis.axhline(0.5, color=QUIET, linewidth=0.8, label="as good as before")
    axis.set_ylim(0, 1)
    finish(axis, "checkpoints of each E-step", "win rate on D_MS", middles)

def plot_steps(axis, run, kind, unit, keys):
    """Draw metrics {key: name} over the optimiser steps of all E-steps (kind "E") or M-steps (kind "M")."""
    at, middles = 0, {}
    for phase, rows in training_lines(run, kind):
        for key, colour in zip(keys, SERIES[kind == "M":]):
            trend(axis, [row[key] for row in rows], at, color=colour, label=None if at else keys[key])
        axis.axvline(at, color=QUIET, linewidth=0.5, linestyle=":")
        middles[at + len(rows) / 2] = phase
        at += len(rows)
    finish(axis, f"{at} optimiser steps", unit, middles)

def plot_lengths(axis, run):
    """Draw the median response length in each E-step's samples, and the middle 80% as a band."""
    low, middle, high = np.transpose([np.percentile(s["lengths"], (10, 50, 90)) for s in e_steps(run)])
    axis.fill_between(range(len(low)), low, high, color=SERIES[0], alpha=0.2, linewidth=0)
    trend(axis, middle, color=SERIES[0])
    axis.set_ylim(0)
    finish(axis, "E-step", "tokens per response", {at: s["phase"] for at, s in enumerate(e_steps(run))})

def plot_accuracy(axis, run):
    """Draw how often the RM in use orders two answers to a prompt as gold does."""
    for key, name, colour in (("accuracy_current", "on own answers", SERIES[0]),
                              ("accuracy_base", "on the base’s answers", SERIES[1])):
        trend(axis, [state[key] for state in run["states"]], color=colour, label=name)
    finish(axis, "policy after round, and the RM in use", "RM accuracy", {
        at: f"{s['policy']}\n{s['rm']}" for at, s in enumerate(run["states"])})

def plot_margins(axis, step):
    """Draw a histogram of Δr, with dropped comparisons stacked on kept ones, and a line at −ε."""
    axis.hist([step["margins"][step["mask"]], step["margins"][~step["mask"]]], 40, stacked=True,
              color=[SERIES[0], QUIET], label=["kept", "dropped"])
    axis.axvline(-step["epsilon"], color=SERIES[1], linestyle="--", label="−ε")
    finish(axis, "Δr = r(new) − r(old)", "comparisons")

def draw_picture(run):
    """Write report.png: win rates, the judge's figure of each policy, and RM accuracy or, without gold,
    response lengths. Return its path."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 3.6), layout="constrained")
        axes = figure.subplots(1, 3)
        plot_win_rates(axes[0], run)
        if run["states"]:
            plot_states(axes[1], [run], run["judge"])
        if e_steps(run):
            (plot_accuracy if run["gold"] else plot_lengths)(axes[2], run)
        figure.savefig(run["folder"] / "report.png", dpi=110)
    return run["folder"] / "report.png"

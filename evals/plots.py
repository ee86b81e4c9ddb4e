"""A run's curves, each a function on a matplotlib axis, for report.png and the page alike.

matplotlib is imported only where something is drawn, so everything else works without. docs/curves.md says
how to read them.
"""
import io
import re
from html import escape

import numpy as np

from evals.figures import curves, e_steps, responses_of, seconds_of, short, stopped, visible
from evals.stats import wilson

UNITS = {"gold": "gold on test prompts ± se", "reward_r0": "reward under RM 0 ± se"}
SERIES = ["#2f6fb5", "#c8612a", "#3c8d5a", "#8a5bb1", "#b03a5b", "#7a6a1f"]  # the page's --s0, --s1, …
INK, QUIET = "#22252b", "#8b9099"                                            # and --ink, --quiet
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9.5, "text.color": INK,
         "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.edgecolor": QUIET,
         "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "legend.fontsize": 9, "lines.markersize": 4.5, "lines.linewidth": 1.5,
         "text.parse_math": False}


def can_plot():
    try:
        import matplotlib
    except ImportError:
        return False
    return bool(matplotlib)


def svg(name, caption, plot):
    """plot(axis) as inline SVG; its colours are the page's variables, its ids begin with `name`.
    '' without matplotlib."""
    if not can_plot():
        return ""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure, file = Figure(figsize=(4.4, 2.7), layout="constrained"), io.StringIO()
        plot(figure.subplots())
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = visible(file.getvalue().partition("<svg")[2])
    text = re.sub(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", text, count=4)
    text = re.sub(r'((?<= )id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, colour in [*((f"s{i}", c) for i, c in enumerate(SERIES)), ("ink", INK), ("quiet", QUIET)]:
        text = text.replace(colour, f"var(--{variable})")
    return (f'<figure><figcaption>{escape(caption)}</figcaption>'
            f'<svg role="img" aria-label="{escape(caption)}"{text}</figure>')


def legend(axis):
    """Above the plot, where it covers no curve."""
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1.4,
                columnspacing=1)


def plot_states(axis, runs, key):
    """A column of gold.jsonl or base.jsonl over each run's states, ± its standard error if it has one."""
    for run, colour in zip(runs, SERIES * len(runs)):
        states = run["states"]
        axis.errorbar(range(len(states)), [line[key] for line in states],
                      [line[f"{key}_se"] for line in states] if f"{key}_se" in states[0] else None,
                      marker="o", color=colour, capsize=2, label=run["label"])
    longest = max((run["states"] for run in runs), key=len)
    axis.set_xticks(range(len(longest)), [line["policy"] for line in longest])
    axis.set(xlabel="policy after", ylabel=UNITS[key])
    if len(runs) > 1:
        legend(axis)


def plot_held_out(axis, run):
    """Mean reward on D_MS, a line per RM: before and after each E-step that it judged."""
    points = {}
    for s in e_steps(run):
        if s["held_out"]:
            points.setdefault(s["rm"], {}).update({
                s["pm"] + after: s["held_out"][at]["reward"] for after, at in enumerate(("before", "after"))})
    for rm, rewards in points.items():
        axis.plot(list(rewards), list(rewards.values()), marker="o", color=SERIES[rm % 6],
                  label=f"by RM {rm}")
    legend(axis)
    made = sum(bool(s["chosen"]) for s in e_steps(run))
    axis.set_xticks(range(made + 1 + stopped(run)), [*range(made + 1)] + ["discarded"] * stopped(run))
    axis.set(xlabel="PM", ylabel="mean reward")


def plot_win_rates(axis, run):
    """Win rate of every checkpoint against the PM before, with its 95% interval; chosen ones are filled."""
    at, middles = 0, {}
    for s in e_steps(run):
        for i, (name, rate) in enumerate(s["win_rates"].items()):
            low, high = wilson(rate, s["judged"]) if s["judged"] else (rate, rate)
            axis.errorbar(at + i, rate, [[rate - low], [high - rate]], marker="o", color=SERIES[0], capsize=2,
                          markerfacecolor=SERIES[0] if name == s["chosen"] else "none")
        middles[short(s)] = at + (len(s["win_rates"]) - 1) / 2
        at += len(s["win_rates"]) + 1
    for tau in {s["tau"] for s in e_steps(run) if s["tau"]}:
        axis.axhline(tau, color=SERIES[1], linewidth=0.8, linestyle="--", label=f"τ = {tau}")
    axis.axhline(0.5, color=QUIET, linewidth=0.8, label="as good as before")
    axis.set_xticks(list(middles.values()), list(middles))
    axis.set(ylim=(0, 1), ylabel="win rate on D_MS")
    legend(axis)


def plot_steps(axis, run, kind, unit, keys):
    """Metrics over the optimiser steps of all E-steps (or all M-steps), in a row. keys: {key: name}"""
    at, middles = 0, {}
    for phase, rows in curves(run, kind):
        for key, colour in zip(keys, SERIES[kind == "M":]):
            axis.plot(range(at, at + len(rows)), [row[key] for row in rows], color=colour,
                      label=None if at else keys[key])
        axis.axvline(at, color=QUIET, linewidth=0.5, linestyle=":")
        middles[phase.removeprefix("round")] = at + len(rows) / 2
        at += len(rows)
    axis.set_xticks(list(middles.values()), list(middles))
    axis.tick_params(axis="x", length=0)
    axis.set(xlabel=f"{at} optimiser steps shown", ylabel=unit)
    if len(keys) > 1:
        legend(axis)


def plot_lengths(axis, run):
    """Median response length of each PM, the middle 80% as a band."""
    names, lengths, _ = zip(*responses_of(run))
    low, middle, high = np.array([np.percentile(x, (10, 50, 90)) for x in lengths]).T
    axis.fill_between(range(len(names)), low, high, color=SERIES[0], alpha=0.2, linewidth=0)
    axis.plot(middle, marker="o", color=SERIES[0])
    axis.set_xticks(range(len(names)), [name.removeprefix("PM ") for name in names])
    axis.set(xlabel="PM", ylabel="tokens per response", ylim=(0, None))


def plot_finished(axis, run):
    names, _, finished = zip(*responses_of(run))
    axis.plot(np.multiply(finished, 100), marker="o", color=SERIES[0])
    axis.set_xticks(range(len(names)), [name.removeprefix("PM ") for name in names])
    axis.set(xlabel="PM", ylabel="finished responses, %", ylim=(min(90, *np.multiply(finished, 98)), 100.5))


def plot_accuracy(axis, run):
    """How often the RM in use orders two answers as gold does."""
    for key, name, colour in (("accuracy_current", "on own answers", SERIES[0]),
                              ("accuracy_base", "on the base’s answers", SERIES[1])):
        axis.plot([g[key] for g in run["gold"]], marker="o", color=colour, label=name)
    axis.set_xticks(range(len(run["gold"])), [f"{g['policy']}\n{g['rm']}" for g in run["gold"]])
    axis.set(xlabel="policy after, RM in use", ylabel="RM accuracy")
    legend(axis)


def plot_seconds(axis, run):
    found, parts = seconds_of(run)
    below = np.zeros(len(found))
    for part, colour in zip(parts, SERIES):
        seconds = np.array([step[part] for step in found.values()])
        axis.bar(range(len(found)), seconds, bottom=below, color=colour, label=part, width=0.6)
        below += seconds
    axis.set_xticks(range(len(found)), [name.removeprefix("round") for name in found])
    axis.set(ylabel="seconds")
    legend(axis)


def plot_margins(axis, step, limits):
    """Histogram of Δr: kept below, dropped on top, −ε marked."""
    axis.hist([step["margins"][step["mask"]], step["margins"][~step["mask"]]], np.linspace(*limits, 41),
              stacked=True, color=[SERIES[0], QUIET], label=["kept", "dropped"])
    axis.axvline(-step["epsilon"], color=SERIES[1], linestyle="--", label="−ε")
    axis.set(xlabel="Δr = r(new) − r(old)", ylabel="comparisons")
    legend(axis)


def alike(runs, plot):
    """The limits of y within which plot(axis, run) fits for all of these runs: curves that are compared share
    their axes."""
    from matplotlib.figure import Figure
    axes = [Figure().subplots() for _ in runs]
    for axis, run in zip(axes, runs):
        plot(axis, run)
    low, high = zip(*(axis.get_ylim() for axis in axes))
    return min(low), max(high)


def draw_picture(run, path):
    """report.png: win rates, how each policy is judged, and the reward model's accuracy or the lengths."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure, states, judge = Figure(figsize=(13, 3.6), layout="constrained"), run["states"], run["judge"]
        axes = figure.subplots(1, 3)
        plot_win_rates(axes[0], run)
        if states:
            plot_states(axes[1], [run | {"label": judge}], judge)
        if run["gold"]:
            plot_accuracy(axes[2], run)
        elif e_steps(run):
            plot_lengths(axes[2], run)
        figure.savefig(path, dpi=110)

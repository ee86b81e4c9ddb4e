"""Figures of a run: the numbers that its files hold, as a table and as plots. What report.py shows.

Files are streamed: of 60,000 prompts only the numbers and a few sampled texts are held. Numbers are over all
rows. Plots are functions on a matplotlib axis, for report.png and for the page alike; matplotlib is imported
only where something is drawn, so everything else works without.
"""
import io
import random
import re
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np

import labels
from data import Problem, by_prompt, prompt_id
from rows import from_json, is_number, read_json, read_selection

# ---------------------------------------------------------------- files, one row at a time
NUMBER = (int, float)
KINDS = {**dict.fromkeys(("response", "new", "old", "reason"), str), "index": int,
         **dict.fromkeys(("score", "tokens", "margin", "epsilon", "gold", "r0"), NUMBER)}
GOLD = ("policy", "rm", "gold", "gold_se", "win_rate", "tokens", "reward_r0", "accuracy_base",
        "accuracy_current", "length_slope")


def stream(path, *fields):
    """The rows of a JSONL file, one at a time.
    A file that is missing, broken or without one of the fields is a Problem."""
    if not Path(path).exists():
        raise Problem(f"{path}: no such file; this is not a whole run")
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            row = from_json(line, path, number - 1)
            for name in fields:
                kind = KINDS.get(name.rpartition("_")[2], object)
                if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind) \
                        or kind == NUMBER and not is_number(row[name]):
                    raise Problem(f"{path}:{number}: no field {name!r} of the right kind")
            yield row


class Sample:
    """k of the items added, each equally likely, in their order (Vitter's algorithm R).

    The seed is fixed: runs on the same prompts show the same ones.
    """
    def __init__(self, k):
        self.k, self.seen, self.rng, self.kept = k, 0, random.Random(0), {}

    def add(self, item):
        place = self.seen if self.seen < self.k else self.rng.randrange(self.seen + 1)
        if place < self.k:
            self.kept[place] = (self.seen, item)
        self.seen += 1

    def __iter__(self):
        return (item for _, item in sorted(self.kept.values(), key=lambda entry: entry[0]))


# ---------------------------------------------------------------- a run
def load(folder, shown=0):
    """All that table, plots and page say of a run, as a dict; texts of `shown` prompts of each step."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise Problem(f"{folder}: not a run folder (no run.json)")
    try:
        note = read_json(folder / "run.json")
        run = {key: note.get(key, {}) for key in ("settings", "versions", "templates")}
        run |= dict(folder=folder, name=folder.resolve().name, arm=arm(run["settings"]),
                    steps=steps_of(folder, shown))
        for key, fields in (("metrics", ["phase"]), ("gold", GOLD)):
            path = folder / f"{key}.jsonl"
            run[key] = list(stream(path, *fields)) if path.exists() else []
        return run
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Problem(f"{folder}: not a run as mt.py writes it ({reason})") from None


def arm(settings):
    """The paper's name of the ablation that these settings are."""
    off = [key for key in ("update_rm", "select", "filter") if settings.get(key) is False]
    if "update_rm" in off and "filter" in off:
        off.remove("filter")  # without an M-step there is nothing to filter
    names = {"update_rm": "fixed RM (iterative DPO)", "select": "no selection", "filter": "no filter"}
    return ", ".join(names[key] for key in off) or "full"


def phases(run):
    """[(phase, folder)] of the finished E- and M-steps, in order."""
    rounds = [path for path in Path(run).glob("round*") if path.name.removeprefix("round").isdigit()]
    results = {"e1": ["selection.json"], "m": ["rm", "spot_check.jsonl"], "e2": ["selection.json"]}
    return [(f"{folder.name}/{part}", folder / part)
            for folder in sorted(rounds, key=lambda path: int(path.name.removeprefix("round")))
            for part, names in results.items() if any((folder / part / name).exists() for name in names)]


def steps_of(run, shown=0):
    """The E- and M-steps of a run, in order, as dicts; `pm` and `rm`: the numbers of the models in use."""
    steps, pm, rm = [], 0, 0
    for phase, folder in phases(run):
        step = (read_m_step if folder.name == "m" else read_e_step)(phase, folder, shown)
        steps.append(step | dict(pm=pm, rm=rm))
        rm += step["kind"] == "M" and not step["refused"]
        pm += step["kind"] == "E" and bool(step["chosen"])
    return steps


def read_e_step(phase, folder, shown):
    choice, sample, columns = read_selection(folder / "selection.json"), Sample(shown), ([], [], [])
    for group in by_prompt(stream(
            folder / "samples.jsonl", "prompt", "response", "score", "tokens", "finished")):
        sample.add((group, []))
        for column, key in zip(columns, ("score", "tokens", "finished")):
            column.extend(row[key] for row in group)
    if not columns[0]:
        raise Problem(f"{folder / 'samples.jsonl'}: empty")
    paired, pairs_of = Counter(), {prompt_id(group[0]["prompt"]): pairs for group, pairs in sample}
    for pair in stream(folder / "pairs.jsonl", "prompt", "chosen_index", "rejected_index", "reason"):
        prompt = prompt_id(pair["prompt"])
        paired[hash(prompt)] += 1  # a prompt may give several pairs
        pairs_of.get(prompt, []).append(pair)
    scores, lengths, finished = map(np.asarray, columns)
    rates = choice["win_rates"]
    return dict(phase=phase, kind="E", chosen=choice["chosen"], win_rates=rates, tau=choice.get("tau"),
                win_rate=max(rates.values(), default=None), pairs=paired.total(), paired=len(paired),
                reward=scores.mean(), tokens=lengths.mean(), lengths=lengths, finished=finished.mean(),
                sample=sample, held_out=held_out(folder / "select", rates))


def held_out(folder, rates):
    """Reward and lengths on D_MS, the same prompts in every step: the PM before and the best checkpoint."""
    files = {"before": folder / "before.jsonl",
             "after": folder / f"{max(rates, key=rates.get, default='none')}.jsonl"}
    if not all(file.exists() for file in files.values()):
        return None
    values = {at: np.array([(row["score"], row["tokens"]) for row in stream(file, "score", "tokens")])
              for at, file in files.items()}
    return {at: dict(reward=both[:, 0].mean(), lengths=both[:, 1]) for at, both in values.items()}


def read_m_step(phase, folder, shown):
    sample, margins, kept, tokens, dropped = Sample(shown), [], [], 0, {}
    for row in stream(folder / "comparisons.jsonl", "prompt", "new", "old", "new_score", "old_score",
                      "margin", "epsilon", "kept", "reason", "new_tokens", "old_tokens"):
        sample.add(row)
        margins.append(row["margin"])
        kept.append(row["kept"])
        tokens += row["new_tokens"]
        if not row["kept"]:
            dropped[row["reason"]] = dropped.get(row["reason"], 0) + 1
    if not margins:
        raise Problem(f"{folder / 'comparisons.jsonl'}: empty")
    margins, kept = np.array(margins), np.array(kept, bool)
    return dict(phase=phase, kind="M", kept=int(kept.sum()), comparisons=len(kept), margin=margins.mean(),
                margins=margins, mask=kept, epsilon=row["epsilon"], tokens=tokens / len(kept),
                dropped=dropped, sample=sample, refused=labels.refused(folder))


def steps_table(steps):
    """The steps as text. Reward and length are those of the E-step's samples, before its update."""
    lines = [f"{'step':12} {'sampled reward':>14} {'tokens':>7} {'finished':>8} "
             f"{'pairs':>11} {'win rate':>8}  outcome"]
    for s in steps:
        if s["kind"] == "E":
            rate = "-" if s["win_rate"] is None else f"{s['win_rate']:.3f}"
            outcome = "policy: " + s["chosen"] if s["chosen"] else "discarded, run stopped"
            lines.append(f"{s['phase']:12} {s['reward']:14.3f} {s['tokens']:7.1f} {s['finished']:8.1%} "
                         f"{s['pairs']:11} {rate:>8}  {outcome}")
        else:
            made = f" refused by --{s['refused']}" if s["refused"] else ""
            lines.append(f"{s['phase']:12} {'':14} {s['tokens']:7.1f} {'':8} "
                         f"{s['kept']:5}/{s['comparisons']:<5} {'':8}  "
                         f"reward model{made}; margin {s['margin']:+.3f}, epsilon {s['epsilon']:.3f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- what is asked of a run
def e_steps(run):
    return [s for s in run["steps"] if s["kind"] == "E"]


def m_steps(run):
    return [s for s in run["steps"] if s["kind"] == "M"]


def stopped(run):
    """Whether the run's last E-step was discarded, which ends it."""
    return bool(run["steps"]) and run["steps"][-1].get("chosen", True) is None


def title(step):
    number, part = step["phase"].removeprefix("round").split("/")
    return f"round {number} · {dict(e1='E(a)', m='M(b)', e2='E(c)')[part]}"


def short(step):
    """A step under an axis: round and part."""
    return title(step).removeprefix("round ").replace(" · ", "\n")


def training_lines(run, kind):
    """[(phase, log lines)] of the training of PMs ("E") or RMs ("M"), in order."""
    key, found = {"E": "rewards/margins", "M": "mean_reward"}[kind], {}
    for row in run["metrics"]:
        if key in row:
            found.setdefault(row["phase"].rsplit("/", 1)[0], []).append(row)
    return list(found.items())


def lengths_of(run):
    """[(PM, its responses' lengths)]: of the E-steps' samples; the last PM has only its answers on D_MS."""
    found = [(f"PM {s['pm']}", s["lengths"]) for s in e_steps(run)]
    last = run["steps"][-1] if run["steps"] else {}
    if last.get("chosen") and last["held_out"]:
        found.append((f"PM {last['pm'] + 1}", last["held_out"]["after"]["lengths"]))
    return found


# ---------------------------------------------------------------- plots
HIDDEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]")
SERIES = ["#2f6fb5", "#c8612a", "#3c8d5a", "#8a5bb1", "#b03a5b", "#7a6a1f"]  # the page's --s0, --s1, …
INK, QUIET = "#22252b", "#8b9099"                                            # and --ink, --quiet
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9.5, "text.color": INK,
         "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.edgecolor": QUIET,
         "xtick.color": QUIET, "ytick.color": QUIET, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "legend.fontsize": 9, "lines.markersize": 4.5, "lines.linewidth": 1.5,
         "text.parse_math": False}


def visible(text):
    """A text in which what would not be seen, or would turn the writing round, is named."""
    return HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


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


def plot_gold(axis, runs, key):
    """A column of gold.jsonl over the states of each run, with its standard error where it has one."""
    for run, colour in zip(runs, SERIES * len(runs)):
        gold = run["gold"]
        axis.errorbar(range(len(gold)), [line[key] for line in gold],
                      [line[f"{key}_se"] for line in gold] if f"{key}_se" in gold[0] else None, marker="o",
                      color=colour, capsize=2, label=run["label"])
    longest = max((run["gold"] for run in runs), key=len)
    axis.set_xticks(range(len(longest)), [line["policy"] for line in longest])
    if len(runs) > 1:
        axis.legend()


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
    axis.legend()
    made = sum(bool(s["chosen"]) for s in e_steps(run))
    axis.set_xticks(range(made + 1 + stopped(run)),
                    [f"PM {i}" for i in range(made + 1)] + ["(discarded)"] * stopped(run))


def plot_steps(axis, run, kind, key):
    """A metric over the optimiser steps of all E-steps (or all M-steps), one after the other."""
    at, middles = 0, {}
    for phase, rows in training_lines(run, kind):
        axis.plot(range(at, at + len(rows)), [row[key] for row in rows], color=SERIES[kind == "M"])
        axis.axvline(at, color=QUIET, linewidth=0.5, linestyle=":")
        middles[phase.removeprefix("round")] = at + len(rows) / 2
        at += len(rows)
    axis.set_xticks(list(middles.values()), list(middles))
    axis.tick_params(axis="x", length=0)
    axis.set_xlabel(f"{at} optimiser steps")


def plot_lengths(axis, run):
    """Median response length of each PM, the middle 80% as a band."""
    names, lengths = zip(*lengths_of(run))
    low, middle, high = np.array([np.percentile(x, (10, 50, 90)) for x in lengths]).T
    axis.fill_between(range(len(names)), low, high, color=SERIES[0], alpha=0.2, linewidth=0)
    axis.plot(middle, marker="o", color=SERIES[0])
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="tokens", ylim=(0, None))


def plot_margins(axis, step, limits):
    """Histogram of Δr: kept below, dropped on top, −ε marked."""
    axis.hist([step["margins"][step["mask"]], step["margins"][~step["mask"]]], np.linspace(*limits, 41),
              stacked=True, color=[SERIES[0], QUIET], label=["kept", "dropped"])
    axis.axvline(-step["epsilon"], color=SERIES[1], linestyle="--", label="−ε")
    axis.set(xlabel="Δr = r(new) − r(old)", ylabel="comparisons")
    axis.legend()


def draw_picture(run, path):
    """report.png: win rates, gold and reward of each policy, accuracy of each reward model."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    e, m, gold = e_steps(run), m_steps(run), run["gold"]
    rates = [s for s in e if s["win_rate"] is not None]
    axes[0].bar([short(s) for s in rates], [s["win_rate"] for s in rates],
                color=["tab:blue" if s["chosen"] else "tab:gray" for s in rates])
    axes[0].axhline(0.5, color="black", linewidth=0.8)
    for tau in {s["tau"] for s in rates if s["tau"]}:
        axes[0].axhline(tau, color="black", linewidth=0.8, linestyle=":")
    axes[0].set(title="win rate on D_MS (grey: discarded)", ylim=(0, 1))
    if gold:
        plot_gold(axes[1], [run | {"label": "gold"}], "gold")
        axes[1].plot([g["reward_r0"] for g in gold], marker="s", color=SERIES[1], label="reward by r0")
        axes[1].legend()
        axes[1].set(title="gold and reward on test prompts")
        axes[2].plot([g["accuracy_base"] for g in gold], marker="o", label="on base policy's answers")
        axes[2].plot([g["accuracy_current"] for g in gold], marker="s", label="on this policy's answers")
        axes[2].set_xticks(range(len(gold)), [f"{g['policy']}\nRM: {g['rm']}" for g in gold])
        axes[2].legend()
        axes[2].set(title="accuracy of the reward model in use")
    else:
        axes[1].plot([short(s) for s in e], [s["reward"] for s in e], marker="o")
        axes[1].set(title="mean reward of the E-step's samples")
        axes[2].bar([short(s) for s in m], [s["kept"] / s["comparisons"] for s in m])
        axes[2].set(title="share of comparisons kept", ylim=(0, 1))
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=110)

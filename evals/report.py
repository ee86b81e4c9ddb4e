"""A run to look at: prints its table, draws report.png, writes report.html.

    python eval.py report runs/mt                      # or several: RUN RUN --out page.html

The page is one file without network: HTML that reads without JavaScript, matplotlib's SVG inline, a few lines
of script to sort and search. Its figures are over all rows; texts are a sample by a fixed seed, cut off at
TEXT_BYTES, so that a run of 60,000 prompts still opens at once.

Texts of models are data: all that comes from a file passes `escape`, none of it stands in the script, and the
page's policy (CSP) lets no other script run and nothing be loaded.
"""
import base64
import hashlib
import html
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data import as_messages
from evals import figures, plots
from evals.figures import curves, e_steps, m_steps, responses_of, seconds_of, stopped, title, with_interval
from evals.gold import gold_table
from evals.plots import can_plot, svg
from evals.stats import wilson
from parallel import rank, say
from toy import gold_of

SHOWN, SHOWN_IN_ALL = 100, 1500  # prompts of a step, of a page
TEXT_BYTES = 5_000_000           # all texts of a page; with plots and tables it stays well below 10 MB
LONGEST = 8000                   # characters of a text; the rest is cut off, with a note


@dataclass
class Report:
    runs: list[str] = field(metadata={"help": "run folders"})
    out: str = field(default="", metadata={"help": "the page, or the folder for it; none: the first run's"})


def report(*folders, out=""):
    """Print each run's table and draw its report.png; write one report.html for all of them, side by side."""
    if rank() > 0:
        return
    steps = sum(len(figures.phases(folder)) for folder in folders)
    runs = [figures.load(folder, max(10, min(SHOWN, SHOWN_IN_ALL // max(1, steps)))) for folder in folders]
    for run in runs:
        run["label"] = run["arm"] if [r["arm"] for r in runs].count(run["arm"]) == 1 else run["name"]
        tell(run)
    path = Path(out) if out.endswith(".html") else Path(out or folders[0]) / "report.html"
    write(path, page(runs))
    say(f"page: {path}")


def tell(run):
    say(f"\n{run['name']}: {run['arm']}\n{figures.steps_table(run['steps'])}\n")
    if run["gold"]:
        say(gold_table(run["states"]) + "\n")
    said, *warned = figures.verdict(run)
    say("\n".join([f"{said} {outcome(run)}", *warned]) + "\n")
    if not can_plot():
        return say("no picture: pip install matplotlib")
    plots.draw_picture(run, run["folder"] / "report.png")
    say(f"picture: {run['folder'] / 'report.png'}")


def write(path, parts):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(parts)
    os.replace(temporary, path)


# ---------------------------------------------------------------- the page
def escape(text):
    return html.escape(figures.visible(text))


def page(runs):
    """The page's parts, in order."""
    name = escape(" · ".join(run["name"] for run in runs))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    yield (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
           '<meta name="viewport" content="width=device-width">'
           f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{CSS}</style>'
           f'<h1>{name}</h1><p class=note>Mutual-Taught: policy models (PM) and reward models (RM) that '
           'train each other. Figures are over all rows of the run’s files, texts are a sample.')
    if not can_plot():
        yield "<p>Without plots: <code>pip install matplotlib</code>, then write this page again."
    found = sections(runs)
    links = "".join(f'<a href="#{i}">{escape(head)}</a>' for i, (head, *_) in enumerate(found))
    yield f"<nav>{links}</nav>"
    for number, (head, note, *parts) in enumerate(found):
        yield (f'<section><h2 id="{number}">{escape(head)}</h2><p class=note>{escape(note)}</p>'
               f'{"".join(parts)}</section>\n')
    yield f"<script>{SCRIPT}</script></html>\n"


def sections(runs):
    """[(heading, note, HTML, …)]"""
    judged = [run for run in runs if run["states"]]
    return [
        ("Did it work?", FIRST, *[compared(runs)] * (len(runs) > 1), side(runs, first_screen)),
        ("Policies and reward models", "Win rates of a step’s checkpoints are against the PM before, on the "
         "held-out prompts of D_MS, judged by the RM in use, with their 95% intervals.", side(runs, chain)),
        ("Reward", "Rewards of different RMs have different scales: compare within one. On D_MS the prompts "
         "are the same throughout.", together(overlaid([run for run in judged if run["gold"]], "gold"),
                                              overlaid(judged, "reward_r0")), side(runs, rewards(runs))),
        ("Training", "A step’s figures are from before its update. Left out are DPO’s first step, in which "
         "policy and reference are the same, and a last one with less than half a batch. The RM starts from "
         "RM 0 each time.", side(runs, losses(runs))),
        ("Length and time", "Of the E-steps’ samples; of the last PM, its answers on D_MS. Line: median; "
         "band: the middle 80%.", side(runs, lengths(runs))),
        ("Comparisons", "Δr is the reward of the new PM’s answer minus that of the old one’s. At or below "
         "−ε, a standard deviation of the old rewards, a comparison is dropped.", side(runs, margins(runs))),
        ("Accuracy of the reward models", "How often the RM in use orders two answers as gold does, where "
         "gold has a preference. Length slope: by how many of its standard deviations the reward of an "
         "answer to the same prompt rises with ten more tokens.", side(runs, accuracies)),
        ("Texts", f"A sample by a fixed seed, at most {SHOWN} prompts of a step; the run’s files have all.",
         TOOLS, side(runs, texts(runs))),
        ("Configuration and versions", "", configuration(runs))]


FIRST = ("Judged by gold where there is one, on test prompts that nothing else has seen; else by RM 0, the "
         "base reward model, on D_MS. In brackets: 95% intervals; ±: standard errors (se).")


def side(runs, panel):
    """A panel per run, next to each other where the screen is wide enough."""
    heads = [f"<h3>{escape(run['name'])}: {escape(run['arm'])}</h3>" * (len(runs) > 1) for run in runs]
    panels = "".join(f"<div>{head}{panel(run)}</div>" for head, run in zip(heads, runs))
    return f'<div class="side{" one" * (len(runs) == 1)}">{panels}</div>'


def together(*drawn):
    return f"<div class=plots>{''.join(drawn)}</div>"


def plot(runs, name, caption, draw):
    """A function from a run to its plot by draw(axis, run), on the same axes for all; '' if it is not of
    `runs`."""
    limits = plots.alike(runs, draw) if can_plot() and runs else None

    def of(run):
        def drawn(axis):
            draw(axis, run)
            axis.set_ylim(limits)
        return svg(mark(run, name), caption, drawn) if run in runs else ""
    return of


def grid(head, rows, style=""):
    """An HTML table of texts."""
    def line(tag, values):
        return "<tr>" + "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)
    lines = f'<thead>{line("th", head)}<tbody>{"".join(line("td", row) for row in rows)}'
    return f'<div class=wide><table class="{style}">{lines}</table></div>' if rows else ""


def folded(head, rows):
    """A table that a click opens: the plots beside it show the same."""
    return f"<details><summary class=note>figures</summary>{grid(head, rows)}</details>" if rows else ""


def num(value, digits=3):
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def mark(run, name):
    """A prefix for the ids in a plot, which must differ within the page."""
    return f"{name}{hashlib.sha256(str(run['folder']).encode()).hexdigest()[:6]}"


# ---------------------------------------------------------------- figures
def compared(runs):
    rows = []
    for run in runs:
        states = run["states"] or [{}]
        first, last, judge = states[0], states[-1], run["judge"]
        best = max(states, key=lambda state: state.get(judge, 0))
        rows.append([run["name"], run["arm"], "gold" if run["gold"] else "RM 0", num(first.get(judge)),
                     f"{num(best.get(judge))} ({best.get('policy', '–')})", num(last.get(judge)),
                     with_interval(last["win_rate"], last["n"]) if last else "–",
                     *(num(last.get(key)) for key in ("accuracy_current", "accuracy_base")), outcome(run)])
    return grid(["run", "ablation", "judge", "base", "best", "last", "last, win vs base", "RM accuracy: own",
                 "base’s answers", "outcome"], rows, "plain")


def first_screen(run):
    said, *warned = figures.verdict(run)
    head = ["policy", "gold ± se", "win vs base", "RM accuracy, own answers"] if run["gold"] else [
        "policy", "win vs base"]
    rows = [[s["policy"], *([f"{num(s['gold'])} ± {num(s['gold_se'])}"] if run["gold"] else []),
             with_interval(s["win_rate"], s["n"] * (s is not run["states"][0])),
             *([num(s["accuracy_current"])] if run["gold"] else []),
             f"{num(s['reward_r0'])} ± {num(s['reward_r0_se'])}", num(s["tokens"], 1), f"{s['finished']:.1%}"]
            for s in run["states"]]
    return (f"<p class=verdict>{escape(said)} {escape(outcome(run))}</p>"
            + "".join(f"<p class=warning>{escape(line)}</p>" for line in warned)
            + grid([*head, "reward under RM 0 ± se", "tokens", "finished"], rows))


def outcome(run):
    if stopped(run):
        s = run["steps"][-1]
        low, high = wilson(s["win_rate"], s["judged"])
        inside = " (τ is within the interval)" * (low < s["tau"] < high)
        return (f"Stopped in {title(s)}: best win rate {with_interval(s['win_rate'], s['judged'])} < τ = "
                f"{s['tau']}{inside}; PM {s['pm']} stays.")
    rounds, of_a_round = run["settings"].get("rounds", 0), 2 + (run["settings"].get("update_rm") is not False)
    if len(run["steps"]) < rounds * of_a_round:
        return f"Unfinished: {len(run['steps'])} of {rounds * of_a_round} steps so far."
    return f"All {rounds} rounds are done." if rounds > 1 else "The round is done."


def chain(run):
    end = f"<li{' class=stop' * stopped(run)}><b>{escape(outcome(run))}</b>"
    drawn = any(s["win_rates"] for s in e_steps(run)) and svg(
        mark(run, "win"), "Win rate of each checkpoint", lambda axis: plots.plot_win_rates(axis, run))
    return f"<ol class=chain>{''.join(map(chain_link, run['steps']))}{end}</ol>{together(drawn or '')}"


def chain_link(s):
    """A step as a link of the chain."""
    if s["kind"] == "M":
        made, share = s["refused"] or f"RM {s['rm'] + 1}", s["kept"] / s["comparisons"]
        what = f"RM {s['rm']} → {made}"
        head, facts = f"{s['kept']} of {s['comparisons']} comparisons kept", []
    else:
        made, share = f"PM {s['pm'] + 1}" if s["chosen"] else "discarded", s["win_rate"]
        what = f"PM {s['pm']} → {made}"
        head = "no selection" if share is None else f"win rate {with_interval(share, s['judged'])}"
        facts = [" · ".join(f"{step}: {num(rate)}{' ✓' * (step == s['chosen'])}"
                            for step, rate in s["win_rates"].items()),
                 f"{s['paired']} of {s['sample'].seen} prompts gave a pair"]
    bar = f'<span class=bar style="--w:{share:.1%}"></span>' if share is not None else ""
    facts = "<br>".join(map(escape, filter(None, [*facts, f"judged by RM {s['rm']}"])))
    return f"<li class={s['kind']}>{escape(title(s))}<b>{what}</b>{head}{bar}<div class=note>{facts}</div>"


def overlaid(runs, key):
    """A column of the states, all runs in one plot."""
    return runs and svg(key, plots.UNITS[key], lambda axis: plots.plot_states(axis, runs, key)) or ""


def rewards(runs):
    drawn = plot([run for run in runs if any(s["held_out"] for s in e_steps(run))], "held",
                 "Mean reward on D_MS", plots.plot_held_out)

    def panel(run):
        rows = [[title(s), f"PM {s['pm']}", f"RM {s['rm']}", num(s["reward"]),
                 *(num(s["held_out"] and s["held_out"][at]["reward"]) for at in ("before", "after"))]
                for s in e_steps(run)]
        head = ["E-step", "PM", "judge", "of its samples", "D_MS before", "D_MS after"]
        return together(drawn(run)) + folded(head, rows)
    return panel


METRICS = [("E", "DPO loss", "loss", {"loss": ""}),
           ("E", "DPO rewards", "β log π/π_ref",
            {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
           ("E", "DPO log-probabilities", "nats",
            {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
           ("E", "DPO accuracy", "accuracy", {"rewards/accuracies": ""}),
           ("M", "RM loss", "loss", {"loss": ""}), ("M", "RM margins", "margin", {"margin": ""}),
           ("M", "RM accuracy", "accuracy", {"accuracy": ""})]


def has(run, kind, keys):
    """Whether a run's trainings have these metrics: variants have others."""
    found = curves(run, kind)
    return bool(found) and all(keys <= rows[0].keys() for _, rows in found)


def losses(runs):
    drawn = [plot([run for run in runs if has(run, kind, keys.keys())], f"{kind}{i}", name,
                  partial(plots.plot_steps, kind=kind, unit=unit, keys=keys))
             for i, (kind, name, unit, keys) in enumerate(METRICS)]
    columns = {"E": ("loss", "rewards/margins", "rewards/accuracies"), "M": ("loss", "margin", "accuracy")}

    def panel(run):
        rows = []
        for kind, keys in columns.items():
            for phase, log in curves(run, kind) if has(run, kind, {*keys}) else []:
                fifth = -(-len(log) // 5)
                rows.append([phase.removeprefix("round"), log[-1].get("steps", "–"), *(
                    num(np.mean([row[key] for row in part])) for key in keys
                    for part in (log[:fifth], log[-fifth:]))])
        head = ["phase", "steps", *(f"{name}: {part}" for name in ("loss", "margins", "accuracy")
                                    for part in ("first fifth", "last fifth"))]
        return together(*(one(run) for one in drawn)) + folded(head, rows)
    return panel


def lengths(runs):
    some = [run for run in runs if e_steps(run)]
    drawn = [plot(some, "len", "Tokens per response", plots.plot_lengths),
             plot(some, "end", "Finished responses", plots.plot_finished),
             plot([run for run in runs if run["timings"]], "sec", "Where the time went", plots.plot_seconds)]

    def panel(run):
        rows = [[name, *(num(np.percentile(x, q), 0) for q in (10, 50, 90)), num(x.mean(), 1), f"{share:.1%}"]
                for name, x, share in responses_of(run)]
        seconds, parts = seconds_of(run)
        ratio = seconds and (f"<p class=note>In all {figures.times_dpo(run):.2f} times the time of DPO on "
                             "the same pairs (the E-steps’ sampling, scoring, training), by timings.jsonl.")
        return (together(*(one(run) for one in drawn)) + (ratio or "")
                + folded(["PM", "10%", "median", "90%", "mean", "finished"], rows)
                + folded(["seconds", *parts], [[step, *(num(s[part], 1) for part in parts)]
                                               for step, s in seconds.items()]))
    return panel


def margins(runs):
    """The panel of Δr, on one scale for all runs."""
    every = np.concatenate([s["margins"] for run in runs for s in m_steps(run)] or [[0, 1]])
    limits = every.min(), max(every.max(), every.min() + 1e-6)

    def panel(run):
        drawn = [svg(mark(run, f"dr{i}"), title(s), lambda x, s=s: plots.plot_margins(x, s, limits))
                 for i, s in enumerate(m_steps(run))]
        rows = [[title(s), s["comparisons"], s["kept"], s["comparisons"] - s["kept"], num(s["margin"]),
                 num(s["epsilon"]), ", ".join(f"{n} {why}" for why, n in sorted(s["dropped"].items())) or "–"]
                for s in m_steps(run)]
        head = ["M-step", "comparisons", "kept", "dropped", "mean Δr", "ε", "dropped because"]
        return together(*drawn) + folded(head, rows) if rows else "<p>No M-step: nothing was compared.</p>"
    return panel


def accuracies(run):
    keys = ("accuracy_current", "accuracy_base", "length_slope")
    rows = [[g["policy"], g["rm"], *(num(g[key]) for key in keys)] for g in run["gold"]]
    return grid(["after", "RM in use", "on own answers", "on the base’s", "length slope"], rows) or (
        "<p>This run has no gold; <code>eval.py agreement --run RUN</code> holds its RMs against each other.")


# ---------------------------------------------------------------- texts
def texts(runs):
    """The panel of texts; all steps of all runs have equal shares of TEXT_BYTES."""
    budget = TEXT_BYTES // max(1, sum(len(run["steps"]) for run in runs))

    def panel(run):
        kinds = [s["kind"] for s in run["steps"]]
        return "".join(f"<details class=step{' open' * (kinds.index(s['kind']) == i)}>"
                       f"{step_texts(run, s, budget)}</details>" for i, s in enumerate(run["steps"]))
    return panel


def step_texts(run, step, budget):
    items, used = [], 0
    for number, drawn in enumerate(step["sample"]):
        item = (comparison if step["kind"] == "M" else responses)(run, drawn, number)
        used += len(item.encode())
        if used > budget:
            break
        items.append(item)
    what = "new against old" if step["kind"] == "M" else f"PM {step['pm']}"
    return (f"<summary>{title(step)} <span class=note>{what}, judged by RM {step['rm']}: {len(items)} of "
            f"{step['sample'].seen} prompts</span></summary><ol class=items>{''.join(items)}</ol>")


def entry(number, prompt, shown, body, **values):
    """A prompt in the list; `values` are what it can be sorted by. The first one is open."""
    data = "".join(f' data-{name}="{value:.6g}"' for name, value in {"drawn": number, **values}.items())
    return (f"<li class=item{data}><details{' open' * (number == 0)}><summary><span class=prompt>"
            f"{cut(as_text(prompt))}</span><span class=nums>{shown}</span></summary>{body}</details>")


def as_text(prompt):
    """A chat as text; who speaks is said where others than the user do."""
    turns = as_messages(prompt)
    return "\n".join(f"{t['role']}: {t['content']}" if len(turns) > 1 else t["content"] for t in turns)


def cut(text):
    """A text as HTML, at most LONGEST characters of it."""
    rest = len(text) - LONGEST
    return escape(text[:LONGEST]) + (f"<i> … {rest} more characters</i>" if rest > 0 else "")


def responses(run, drawn, number):
    """All responses to a prompt, by falling reward; which became chosen and rejected, and why."""
    group, pairs = drawn
    scores, roles = [row["score"] for row in group], {}
    why = "no pair: all rewards are equal" if len(set(scores)) == 1 else "no pair: the same text twice"
    for pair in pairs:
        roles[pair["rejected_index"]] = ("bad", "rejected")
        roles[pair["chosen_index"]] = ("good", "chosen")
    why = "; ".join(pair["reason"] for pair in pairs) or why
    gap = max((scores[pair["chosen_index"]] - scores[pair["rejected_index"]] for pair in pairs), default=0.0)
    body = "".join(answer_html(run, group[i], *roles.get(i, ()))
                   for i in sorted(range(len(group)), key=lambda i: -scores[i]))
    return entry(number, group[0]["prompt"], f"Δr {gap:.3f}" if pairs else "no pair",
                 f"<p class=facts>{escape(why)}</p><div class=answers>{body}</div>", gap=gap,
                 reward=np.mean(scores), tokens=np.mean([row["tokens"] for row in group]))


def comparison(run, row, number):
    """The new PM's answer against the old one's, and whether the comparison was kept."""
    style, word = ("good", "kept") if row["kept"] else ("bad", "dropped")
    sides = {name: dict(prompt=row["prompt"], response=row[name], score=row[f"{name}_score"],
                        tokens=row[f"{name}_tokens"], finished=row.get(f"{name}_finished", True))
             for name in ("old", "new")}
    body = "".join(answer_html(run, side, "name", name) for name, side in sides.items())
    why = f"{row['reason']}: Δr {row['margin']:+.3f}, −ε {-row['epsilon']:+.3f}"
    return entry(number, row["prompt"], f"Δr {row['margin']:+.3f} <b class={style}>{word}</b>",
                 f'<p class=facts>{escape(why)}</p><div class="answers two">{body}</div>', gap=row["margin"],
                 reward=row["new_score"], tokens=row["new_tokens"])


def answer_html(run, row, style="", word=""):
    facts = [f"reward {row['score']:.3f}", f"{row['tokens']} tokens", *["cut off"] * (not row["finished"])]
    if run["gold"]:
        facts.insert(1, f"gold {gold_of(row):.3f}")
    facts = f"<b class={style}>{word}</b> " * bool(word) + " · ".join(facts)
    return f"<div class=answer><div class=facts>{facts}</div><p>{cut(row['response'])}</p></div>"


# ---------------------------------------------------------------- configuration
def configuration(runs):
    parts, names = [], [run["name"] for run in runs]
    for part in ("settings", "versions"):
        keys = dict.fromkeys(key for run in runs for key in run[part])
        rows = [[key, *(run[part].get(key, "–") for run in runs)] for key in keys]
        differ = [row for row in rows if len(set(map(str, row[1:]))) > 1]
        if differ:
            parts += [f"<h3>Different {part}</h3>", grid([part, *names], differ, "plain")]
        parts += [f"<h3>All {part}</h3>" * bool(differ), grid([part, *names], rows, "plain")]
    parts += [f"<details><summary>chat template of the {escape(side)}, {escape(run['name'])}</summary>"
              f"<pre>{escape(str(text))}</pre></details>"
              for run in runs for side, text in run["templates"].items()]
    return "".join(parts)


# ---------------------------------------------------------------- style and script
SORTS = {"drawn": "as drawn", "gap": "Δr", "reward": "reward", "tokens": "length", "prompt": "prompt"}
BUTTONS = "".join(f"<button data-key={key}>{name}</button>" for key, name in SORTS.items())
TOOLS = ('<div id=tools hidden><input type=search aria-label=search placeholder="search prompts, answers, '
         f'chosen, dropped …">{BUTTONS}<span id=found role=status></span></div>')
CSS = """
:root { color-scheme: light dark; --bg: #fdfdfc; --card: #fff; --ink: #22252b; --quiet: #8b9099;
  --soft: #5d636e; --line: #e3e4e6; --shade: #0003; --good: #2c7a4b; --bad: #b1452f;
  --s0: #2f6fb5; --s1: #c8612a; --s2: #3c8d5a; --s3: #8a5bb1; --s4: #b03a5b; --s5: #7a6a1f }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --card: #1c1f23; --ink: #e3e5e8;
  --quiet: #7d838d; --soft: #a3a9b3; --line: #31353b; --shade: #fff4; --good: #6cc08b; --bad: #ec8a72;
  --s0: #79aee8; --s1: #f0985f; --s2: #74c48f; --s3: #bd98de; --s4: #e58aa3; --s5: #cdbb62 } }
* { box-sizing: border-box } [hidden] { display: none !important }
html { scroll-padding-top: 3.5rem }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: 0 } h3 { font-size: 1rem; margin: .8rem 0 .4rem } p { margin: .3rem 0 .8rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; border-top: 1px solid var(--line); padding-top: 1rem }
a { color: var(--s0) } nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .87rem }
.note, figcaption, .facts, .nums, #found { color: var(--soft); font-size: .87rem; font-weight: 400 }
p.note { max-width: 60rem } figure { margin: .4rem 0; min-width: 0 }
figure svg { width: 100%; max-width: 30rem; height: auto; display: block }
figure svg text { font-family: inherit !important }
.side, .plots { display: grid; gap: .4rem 1.6rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)) }
.side > *, .plots > * { min-width: 0 } .one { grid-template-columns: minmax(0, 1fr) }
@media (max-width: 40rem) { .side:not(.one) { grid-auto-flow: column; grid-template-columns: none;
  grid-auto-columns: 88%; overflow-x: auto } }
.wide { overflow-x: auto; background:
  linear-gradient(90deg, var(--bg) 50%, transparent) 0 0 / 3rem 100% no-repeat local,
  linear-gradient(270deg, var(--bg) 50%, transparent) 100% 0 / 3rem 100% no-repeat local,
  linear-gradient(90deg, var(--shade), transparent) 0 0 / 1.2rem 100% no-repeat,
  linear-gradient(270deg, var(--shade), transparent) 100% 0 / 1.2rem 100% no-repeat }
.verdict { font-size: 1.15rem; font-weight: 500; max-width: 60rem }
.warning { border-left: 3px solid var(--bad); padding-left: .7rem; max-width: 60rem }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; margin: .4rem 0 }
th, td { padding: .22rem 1.1rem .22rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th { font-weight: 500; color: var(--soft) } .plain td { white-space: normal }
:is(th, td):first-child, .plain :is(th, td) { text-align: left }
.chain, .items { list-style: none; margin: .5rem 0; padding: 0 }
.chain { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14.5rem), 1fr)) }
.chain li { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: .5rem .8rem;
  border-left: 3px solid var(--bar, var(--quiet)); font-size: .87rem }
.chain b { display: block; font-size: 1.05rem } .E { --bar: var(--s0) } .M { --bar: var(--s1) }
.stop { --bar: var(--bad) }
.bar { display: block; height: 5px; margin: .35rem 0; border-radius: 3px;
  background: linear-gradient(var(--bar), var(--bar)) 0 / var(--w) 100% no-repeat var(--line) }
summary { cursor: pointer } .step { margin: .6rem 0 } .step > summary { font-weight: 600 }
.item { border-bottom: 1px solid var(--line); padding: .35rem 0 } .item summary:hover { color: var(--s0) }
.item summary { display: flex; gap: 1rem; align-items: baseline; list-style: none }
.item summary::-webkit-details-marker { display: none }
.prompt { flex: 1; min-width: 0; white-space: pre-wrap; unicode-bidi: isolate; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden }
[open] > summary > .prompt { -webkit-line-clamp: unset; font-weight: 500 }
.nums { flex: none; font-variant-numeric: tabular-nums }
.answers { display: grid; gap: .5rem; margin: .5rem 0 }
.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)) }
.answer { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: .45rem .7rem }
.answer p { margin: 0; white-space: pre-wrap; unicode-bidi: isolate }
.facts b { margin-right: .4rem } .good { color: var(--good) } .bad { color: var(--bad) }
.name { color: var(--ink) }
#tools { position: sticky; top: 0; z-index: 1; background: var(--bg); padding: .5rem 0; display: flex;
  flex-wrap: wrap; gap: .4rem; align-items: center }
#tools :is(input, button) { font: inherit; font-size: .87rem; color: inherit; background: var(--card);
  padding: .25rem .6rem; border: 1px solid var(--line); border-radius: 4px }
#tools input { flex: 1 1 14rem; min-width: 0 } #tools [aria-pressed=true] { border-color: var(--s0) }
pre { white-space: pre-wrap; font-size: .8rem }
"""
SCRIPT = """
const all = selector => [...document.querySelectorAll(selector)], tools = document.getElementById('tools');
const items = all('.item'), buttons = all('#tools button'), words = new Map();
const text = item => words.get(item) || words.set(item, item.textContent.toLowerCase()).get(item);
tools.hidden = false;
tools.querySelector('input').addEventListener('input', event => {
  const wanted = event.target.value.toLowerCase();
  for (const item of items) item.hidden = !text(item).includes(wanted);
  if (wanted) for (const step of all('.step')) step.open = !!step.querySelector('.item:not([hidden])');
  const left = items.filter(item => !item.hidden).length;
  document.getElementById('found').textContent = wanted ? `${left} of ${items.length} prompts` : '';
});
for (const button of buttons) button.addEventListener('click', () => {
  const key = button.dataset.key, was = button.dataset.way;
  const up = was ? was === 'down' : ['drawn', 'prompt'].includes(key);
  for (const other of buttons) { other.dataset.way = ''; other.ariaPressed = other === button; }
  button.dataset.way = up ? 'up' : 'down';
  const value = item => key === 'prompt' ? text(item) : +item.dataset[key];
  const rising = (a, b) => (value(a) > value(b)) - (value(a) < value(b)) || a.dataset.drawn - b.dataset.drawn;
  const order = up ? rising : (a, b) => rising(b, a);
  for (const list of all('.items')) list.append(...[...list.children].sort(order));
});
"""

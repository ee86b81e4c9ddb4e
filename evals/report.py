"""Writes report.html, the page of one or several runs: one file that loads nothing and runs no script.

    python eval.py report runs/mt

Figures are over all rows of the runs' files. Texts are shown for the first prompts of each step only, so that
the page of a run on 60,000 prompts opens at once. Every text from a file goes through `escape`.
"""
import html
from functools import partial

from common.data import as_messages
from common.run import write_text
from common.toy import gold_of
from evals import figures, plots
from evals.figures import e_steps, m_steps, outcome, title, with_interval
from evals.plots import svg

SHOWN = 60              # prompts of a step whose texts are on the page
TEXT_BYTES = 5_000_000  # of HTML for the texts of all steps together
LONGEST = 8000          # characters of one text; a note says how many more it has
TRAINING = [("E", "DPO loss", "loss", {"loss": ""}),  # kind of step, caption, unit, {metric: name}
            ("E", "DPO rewards", "β log π/π_ref",
             {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
            ("E", "DPO log-probabilities", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
            ("M", "RM loss", "loss", {"loss": ""}), ("M", "RM margins", "margin", {"margin": ""}),
            ("M", "RM accuracy in training", "accuracy", {"accuracy": ""})]
CSP = "default-src 'none'; script-src 'none'; style-src 'unsafe-inline'"
CSS = """
:root { color-scheme: light dark; --back: #fdfdfc; --ink: #22252b; --soft: #5d636e; --quiet: #8b9099;
  --line: #e3e4e6; --good: #2c7a4b; --bad: #b1452f; --s0: #2f6fb5; --s1: #c8612a; --s2: #3c8d5a;
  --s3: #8a5bb1; --s4: #b03a5b; --s5: #7a6a1f }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --ink: #e3e5e8; --soft: #a3a9b3;
  --quiet: #7d838d; --line: #31353b; --good: #6cc08b; --bad: #ec8a72; --s0: #79aee8; --s1: #f0985f;
  --s2: #74c48f; --s3: #bd98de; --s4: #e58aa3; --s5: #cdbb62 } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; overflow-wrap: anywhere;
  background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 } h3 { font-size: 1rem; margin: .8rem 0 .4rem } p { margin: .3rem 0 .8rem }
h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; border-top: 1px solid var(--line); padding-top: 1rem }
nav, table, figcaption, .note, .chain { font-size: .87rem } .note, th, figcaption { color: var(--soft) }
nav a { color: var(--s0); margin-right: 1.1rem } p { max-width: 60rem } figure { margin: 0; max-width: 30rem }
.grid { display: grid; gap: .4rem 1.6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)) } .grid > * { min-width: 0 }
.verdict { font-size: 1.15rem; font-weight: 500 } .warning { border-left: 3px solid var(--bad);
  padding-left: .7rem }
svg { width: 100%; height: auto; display: block } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 }
th, td { padding: .22rem 1.1rem .22rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-weight: 400 } :is(th, td):first-child, .long * { text-align: left }
.long td { white-space: normal }
.chain { list-style: none; padding: 0; grid-template-columns: repeat(auto-fill, minmax(14.5rem, 1fr)) }
.chain li, .answer { border: 1px solid var(--line); padding: .45rem .7rem }
.chain b { display: block; font-size: 1.05rem } .good { color: var(--good) } .bad { color: var(--bad) }
details { border-bottom: 1px solid var(--line); padding: .3rem 0 } details details { margin-left: 1rem }
summary { cursor: pointer } .text { white-space: pre-wrap; unicode-bidi: isolate; margin: 0 }
details:not([open]) > summary .text { display: inline-block; max-width: 75%; vertical-align: bottom;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
"""

def write_page(runs, path):
    """Write the page of `runs`, which figures.load has read, to `path`."""
    name, found = escape(" · ".join(run["name"] for run in runs)), sections(runs)
    missing = "<p>There are no plots: run <code>pip install matplotlib</code> and write this page again."
    write_text(path, "".join([
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{CSP}">'
        f'<title>{name}</title><style>{CSS}</style><h1>{name}</h1><p class=note>Mutual-Taught: policy models '
        '(PM) and reward models (RM) that train each other. Figures are over all rows of the run’s files; '
        'the texts are a sample.', missing * (not plots.can_plot()),
        "<nav>", *(f'<a href="#{i}">{head}</a>' for i, (head, *_) in enumerate(found)), "</nav>",
        *(f'<h2 id="{i}">{head}</h2><p class=note>{note}</p>{"".join(parts)}\n'
          for i, (head, note, *parts) in enumerate(found)), "</html>\n"]))

def escape(text):
    return html.escape(plots.visible(str(text)))

def sections(runs):
    """Return [(heading, note, HTML, …)]."""
    size = TEXT_BYTES // max(1, sum(len(run["steps"]) for run in runs))
    return [
        ("Did it work?", "The embedded task’s policies are judged on test prompts of their own by gold, "
         "which knows the task’s rules. It is the sum of form, which the base RM’s labellers looked at, and "
         "content. Other policies are judged by RM 0, the base reward model, on the prompts held out for "
         "model selection (D_MS). “Win vs base” is how often the judge prefers a policy’s answer to the base "
         "policy’s. RM accuracy is how often the RM in use orders two answers to a prompt as gold does. "
         "Brackets hold 95% intervals, and standard errors (se) follow ±.",
         *[comparison_table(runs)] * (len(runs) > 1), side_by_side(runs, first_screen)),
        ("Policies and reward models", "PM 0 and RM 0 are the base models. The win rate of a checkpoint is "
         "how often the RM in use prefers its answer to that of the PM before, on the prompts of D_MS. ✓ "
         "marks the checkpoint that was kept. Δr is the reward of the new PM’s answer minus that of the old "
         "PM’s, and ε is the standard deviation of the old PM’s rewards. A comparison is dropped if both "
         "texts are the same or, unless the filter is off, if Δr is −ε or less.", side_by_side(runs, chain)),
        ("Curves", "Training figures are taken before each optimiser step’s update. Lengths are medians of "
         "an E-step’s samples, with the middle 80% as a band. RM accuracy, Δr and ε are explained above.",
         rewards(runs), side_by_side(runs, curves)),
        ("Texts", f"The first prompts of each step, at most {SHOWN}. Click on a prompt to read its answers. "
         "The run’s files hold the rest.", side_by_side(runs, partial(texts, size=size))),
        ("Time, settings and versions", "", side_by_side(runs, time_table),
         *(settings_table(runs, part) for part in ("settings", "versions")))]

def side_by_side(runs, panel):
    """Return panel(run) of all runs, side by side where the screen is wide enough."""
    if len(runs) == 1:
        return panel(runs[0])
    heads = [escape(f"{run['name']}: {run['arm']}") for run in runs]
    return grid(f"<div><h3>{head}</h3>{panel(run)}</div>" for head, run in zip(heads, runs))

def grid(parts):
    return f"<div class=grid>{''.join(parts)}</div>"

def table(head, rows, style=""):
    """Return an HTML table of values, or '' without rows."""
    def line(tag, values):
        return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)
    lines = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class=wide><table class="{style}">{lines}</table></div>' if rows else ""

def num(value, digits=3):
    return "–" if value is None or value != value else f"{value:.{digits}f}"

def comparison_table(runs):
    rows = []
    for run in runs:
        states, judge = run["states"] or [{}], run["judge"]
        first, last, best = states[0], states[-1], max(states, key=lambda state: state.get(judge, 0))
        rows.append([run["name"], run["arm"], "gold" if run["gold"] else "RM 0", num(first.get(judge)),
                     f"{num(best.get(judge))} ({best.get('policy', '–')})", num(last.get(judge)),
                     with_interval(last["win_rate"], last["n"]) if last else "–",
                     *(num(last.get(key)) for key in ("accuracy_current", "accuracy_base")), outcome(run)])
    return table(["run", "ablation", "judge", "base", "best", "last", "last, win vs base",
                  "RM accuracy, own answers", "RM accuracy, base’s answers", "outcome"], rows, "long")

def first_screen(run):
    gold = bool(run["gold"])
    head = ["policy", *["gold ± se", "form", "content"] * gold, "win vs base",
            *["RM accuracy, own answers"] * gold, "reward under RM 0 ± se", "tokens", "finished"]
    rows = [[s["policy"], *([f"{num(s['gold'])} ± {num(s['gold_se'])}", num(s["form"]), num(s["content"])]
                            if gold else []),
             with_interval(s["win_rate"], s["n"] * (s is not run["states"][0])),
             *([num(s["accuracy_current"])] if gold else []),
             f"{num(s['reward_r0'])} ± {num(s['reward_r0_se'])}", num(s["tokens"], 1), f"{s['finished']:.1%}"]
            for s in run["states"]]
    return (f"<p class=verdict>{escape(figures.verdict(run))} {escape(outcome(run))}</p>"
            + "".join(f"<p class=warning>{escape(line)}</p>" for line in figures.warnings(run))
            + table(head, rows))

def chain(run):
    """Return the list of steps: what each one made, from which models, with its figures."""
    links = []
    for s in run["steps"]:
        if s["kind"] == "M":
            made = f"RM {s['rm']} → RM {s['rm'] + 1}"
            facts = [f"{s['kept']} of {s['comparisons']} comparisons kept",
                     f"mean Δr {s['margin']:+.3f}, ε {s['epsilon']:.3f}"]
        else:
            made = f"PM {s['pm']} → " + (f"PM {s['pm'] + 1}" if s["chosen"] else "discarded")
            facts = [f"win rate {with_interval(s['win_rate'], s['judged'])}" if s["win_rates"]
                     else "no selection",
                     " · ".join(f"{step}: {rate:.3f}{' ✓' * (step == s['chosen'])}"
                                for step, rate in s["win_rates"].items()),
                     f"{s['paired']} of {s['prompts']} prompts gave a pair",
                     f"reward {s['reward']:.3f}, {s['tokens']:.1f} tokens, {s['finished']:.1%} finished"]
        facts = "<br>".join(map(escape, filter(None, [*facts, f"judged by RM {s['rm']}"])))
        links.append(f"<li>{escape(title(s))}<b>{made}</b><div class=note>{facts}</div>")
    return f'<ol class="chain grid">{"".join(links)}<li><b>{escape(outcome(run))}</b></ol>'

def rewards(runs):
    judged = {"gold": [run for run in runs if run["gold"]], "reward_r0": [r for r in runs if r["states"]]}
    return grid(svg(plots.UNITS[key], partial(plots.plot_states, runs=some, key=key), "all runs")
                for key, some in judged.items() if some)

def curves(run):
    """Return the plots of a run. One whose metrics are missing is left out, as variants log other metrics."""
    selected = any(s["win_rates"] for s in e_steps(run))
    drawn = [("Win rate of each checkpoint", partial(plots.plot_win_rates, run=run))] * selected
    for kind, caption, unit, keys in TRAINING:
        lines = figures.training_lines(run, kind)
        if lines and all(keys.keys() <= row.keys() for _, rows in lines for row in rows):
            drawn.append((caption, partial(plots.plot_steps, run=run, kind=kind, unit=unit, keys=keys)))
    drawn += [("Tokens per response", partial(plots.plot_lengths, run=run))] * bool(e_steps(run))
    drawn += [(f"Δr, {title(s)}", partial(plots.plot_margins, step=s)) for s in m_steps(run)]
    drawn += [("Accuracy of the reward models", partial(plots.plot_accuracy, run=run))] * bool(run["gold"])
    return grid(svg(caption, draw, run["folder"]) for caption, draw in drawn)

def time_table(run):
    return table(["seconds", *figures.PARTS], [
        [step, *(num(value, 1) for value in seconds.values())] for step, seconds in run["seconds"].items()])

def settings_table(runs, part):
    keys = dict.fromkeys(key for run in runs for key in run[part])
    return table([part, *(run["name"] for run in runs)],
                 [[key, *(run[part].get(key, "–") for run in runs)] for key in keys], "long")

def texts(run, size):
    """Return each step's texts as at most `size` bytes of HTML. The first step of each kind is open."""
    kinds, parts = [s["kind"] for s in run["steps"]], []
    for number, step in enumerate(run["steps"]):
        items, room = [], size
        for drawn in step["texts"]:
            item = (comparison if step["kind"] == "M" else responses)(run, drawn)
            room -= len(item.encode())
            items += [item] * (room >= 0)
        is_open = " open" * (kinds.index(step["kind"]) == number)
        what = "new PM against old" if step["kind"] == "M" else f"PM {step['pm']}"
        parts.append(f"<details{is_open}><summary>{title(step)}: {what}, judged by RM {step['rm']}, "
                     f"{len(items)} of {step['prompts']} prompts</summary>{''.join(items)}</details>")
    return "".join(parts)

def prompt_item(prompt, figure, why, answers):
    """Return a prompt that opens at a click, with its answers and why they were chosen or dropped."""
    turns = as_messages(prompt)
    text = "\n".join(f"{t['role']}: {t['content']}" if len(turns) > 1 else t["content"] for t in turns)
    return (f"<details><summary><span class=text>{shortened(text)}</span> <span class=note>{figure}</span>"
            f"</summary><p class=note>{escape(why)}</p>{grid(answers)}</details>")

def shortened(text):
    """Return at most LONGEST characters of a text as HTML, and how many more there are."""
    rest = len(text) - LONGEST
    return escape(text[:LONGEST]) + (f"<i> … {rest} more characters</i>" if rest > 0 else "")

def responses(run, drawn):
    """Return all responses to a prompt, the highest reward first, and which became chosen and rejected."""
    group, pairs = drawn
    rewards, roles = [row["score"] for row in group], {}
    for pair in pairs:
        roles[pair["rejected_index"]] = "<b class=bad>rejected</b>"
        roles[pair["chosen_index"]] = "<b class=good>chosen</b>"
    why = "; ".join(pair["reason"] for pair in pairs) or (
        "no pair: all rewards are equal" if len(set(rewards)) == 1 else "no pair: chosen equals rejected")
    order = sorted(range(len(group)), key=lambda i: -rewards[i])
    return prompt_item(group[0]["prompt"], f"reward {min(rewards):.3f} to {max(rewards):.3f}", why,
                       [answer(run, group[i], roles.get(i, "")) for i in order])

def comparison(run, row):
    """Return the new PM's answer against the old one's, and whether the comparison was kept."""
    word = "<b class=good>kept</b>" if row["kept"] else "<b class=bad>dropped</b>"
    why = f"{row['reason']}: Δr {row['margin']:+.3f}, −ε {-row['epsilon']:+.3f}"
    return prompt_item(row["prompt"], f"Δr {row['margin']:+.3f} {word}", why, [
        answer(run, dict(prompt=row["prompt"], response=row[side], score=row[f"{side}_score"],
                         tokens=row[f"{side}_tokens"], finished=row.get(f"{side}_finished", True)),
               f"<b>{side}</b>") for side in ("old", "new")])

def answer(run, row, role):
    gold = f" · gold {gold_of(row):.3f}" if run["gold"] else ""
    facts = f"{role} reward {row['score']:.3f}{gold} · {row['tokens']} tokens"
    return (f"<div class=answer><div class=note>{facts}{' · cut off' * (not row['finished'])}</div>"
            f"<p class=text>{shortened(row['response'])}</p></div>")

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
from pathlib import Path

import numpy as np

from data import as_messages
from evals import figures
from evals.figures import e_steps, lengths_of, m_steps, stopped, svg, title, training_lines
from evals.gold import gold_table
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
    say("\n" + figures.steps_table(run["steps"]))
    if run["gold"]:
        run["judge"] = gold_of
        say("\n" + gold_table(run["gold"]))
    if not figures.can_plot():
        return say("\nno picture: pip install matplotlib")
    figures.draw_picture(run, run["folder"] / "report.png")
    say(f"\npicture: {run['folder'] / 'report.png'}")


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
    if not figures.can_plot():
        yield "<p>Without plots: <code>pip install matplotlib</code>, then write this page again."
    found = sections(runs)
    links = "".join(f'<a href="#{i}">{escape(head)}</a>' for i, (head, *_) in enumerate(found))
    yield f"<nav>{links}</nav>"
    for number, (head, note, *parts) in enumerate(found):
        yield f'<h2 id="{number}">{escape(head)}</h2><p class=note>{escape(note)}</p>{"".join(parts)}\n'
    yield f"<script>{SCRIPT}</script></html>\n"


def sections(runs):
    """[(heading, note, HTML, …)]"""
    gold = [run for run in runs if run["gold"]]
    several = [("Runs", "By the names of the paper’s ablations.", compared(runs))] if len(runs) > 1 else []
    return [
        *several,
        ("Policies and reward models", "Win rates of a step’s checkpoints are against the PM before, on "
         "the held-out prompts of D_MS, judged by the RM in use.", side(runs, chain)),
        ("Reward and gold" if gold else "Reward", "Rewards of different RMs have different scales: compare "
         "within one. On D_MS the prompts are the same throughout." + GOLD_NOTE * bool(gold),
         overlaid(gold, gold="Gold on test prompts (± standard error)",
                  reward_r0="Reward by RM 0 on test prompts"), side(runs, rewards)),
        ("Training", "A step’s figures are from before its update. The RM starts from RM 0 each time.",
         side(runs, losses)),
        ("Length of responses", "Of the E-steps’ samples; of the last PM, its answers on D_MS. Line: median; "
         "band: the middle 80%.", side(runs, lengths)),
        ("Comparisons", "Δr is the reward of the new PM’s answer minus that of the old one’s. At or below "
         "−ε, a standard deviation of the old rewards, a comparison is dropped.", side(runs, margins(runs))),
        ("Accuracy of the reward models", "How often the RM in use orders two answers as gold does, where "
         "gold has a preference; “base” is before any M-step.",
         overlaid(gold, accuracy_base="On the base PM’s answers", accuracy_current="On this PM’s answers"),
         side(runs, accuracies)),
        ("Texts", f"A sample by a fixed seed, at most {SHOWN} prompts of a step; the run’s files have all.",
         TOOLS, side(runs, texts(runs))),
        ("Configuration and versions", "", configuration(runs))]


GOLD_NOTE = (" Gold and “reward by RM 0” are on test prompts that nothing else has seen; a run that has "
             "stopped keeps its last PM.")


def side(runs, panel):
    """A panel per run, next to each other where the screen is wide enough."""
    heads = [f"<h3>{escape(run['name'])}: {escape(run['arm'])}</h3>" * (len(runs) > 1) for run in runs]
    panels = "".join(f"<div>{head}{panel(run)}</div>" for head, run in zip(heads, runs))
    return f'<div class="side{" one" * (len(runs) == 1)}">{panels}</div>'


def plots(*drawn):
    return f"<div class=plots>{''.join(drawn)}</div>"


def grid(head, rows, style=""):
    """An HTML table of texts."""
    def line(tag, values):
        return "<tr>" + "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)
    lines = f'<thead>{line("th", head)}<tbody>{"".join(line("td", row) for row in rows)}'
    return f'<div class=wide><table class="{style}">{lines}</table></div>' if rows else ""


def num(value, digits=3):
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def mark(run, name):
    """A prefix for the ids in a plot, which must differ within the page."""
    return f"{name}{hashlib.sha256(str(run['folder']).encode()).hexdigest()[:6]}"


# ---------------------------------------------------------------- figures
def compared(runs):
    rows = []
    for run in runs:
        last = run["gold"][-1] if run["gold"] else {}
        rows.append([run["name"], run["arm"], sum(bool(s["chosen"]) for s in e_steps(run)), len(m_steps(run)),
                     *(num(last.get(key)) for key in ("gold", "win_rate", "accuracy_base")), outcome(run)])
    return grid(["run", "ablation", "new PMs", "new RMs", "last gold", "win vs base", "RM accuracy",
                 "outcome"], rows, "plain")


def outcome(run):
    if stopped(run):
        s = run["steps"][-1]
        return (f"Stopped in {title(s)}: best win rate {num(s['win_rate'])} < τ = {s['tau']}; "
                f"PM {s['pm']} stays.")
    rounds, of_a_round = run["settings"].get("rounds", 0), 2 + (run["settings"].get("update_rm") is not False)
    if len(run["steps"]) < rounds * of_a_round:
        return f"Unfinished: {len(run['steps'])} of {rounds * of_a_round} steps so far."
    return f"All {rounds} rounds are done." if rounds > 1 else "The round is done."


def chain(run):
    end = f"<li{' class=stop' * stopped(run)}><b>{escape(outcome(run))}</b>"
    return f"<ol class=chain>{''.join(map(chain_link, run['steps']))}{end}</ol>"


def chain_link(s):
    """A step as a link of the chain."""
    if s["kind"] == "M":
        made, share = s["refused"] or f"RM {s['rm'] + 1}", s["kept"] / s["comparisons"]
        what = f"RM {s['rm']} → {made}"
        head, facts = f"{s['kept']} of {s['comparisons']} comparisons kept", []
    else:
        made, share = f"PM {s['pm'] + 1}" if s["chosen"] else "discarded", s["win_rate"]
        what = f"PM {s['pm']} → {made}"
        head = "no selection" if share is None else f"win rate {num(share)}"
        facts = [f"{step}: {num(rate)}{' ✓' * (step == s['chosen'])}"
                 for step, rate in s["win_rates"].items()]
        facts.append(f"{s['paired']} of {s['sample'].seen} prompts gave a pair")
    bar = f'<span class=bar style="--w:{share:.1%}"></span>' if share is not None else ""
    facts = "<br>".join(map(escape, [*facts, f"judged by RM {s['rm']}"]))
    return f"<li class={s['kind']}>{escape(title(s))}<b>{what}</b>{head}{bar}<div class=note>{facts}</div>"


def overlaid(runs, **drawn):
    """Columns of gold.jsonl, all runs in one plot. drawn: column = caption."""
    return plots(*(svg(key, caption, lambda x, key=key: figures.plot_gold(x, runs, key))
                   for key, caption in drawn.items() if runs))


def rewards(run):
    gold = grid(["test prompts", "gold", "± se", "win vs base", "tokens", "reward by RM 0"], [
        [g["policy"], *(num(g[key]) for key in ("gold", "gold_se", "win_rate")), num(g["tokens"], 1),
         num(g["reward_r0"])] for g in run["gold"]])
    rows = [[title(s), f"PM {s['pm']}", f"RM {s['rm']}", num(s["reward"]),
             *(num(s["held_out"] and s["held_out"][at]["reward"]) for at in ("before", "after"))]
            for s in e_steps(run)]
    plot = svg(mark(run, "held"), "Mean reward on D_MS", lambda x: figures.plot_held_out(x, run)) \
        if any(s["held_out"] for s in e_steps(run)) else ""
    table = grid(["E-step", "PM", "judge", "of its samples", "D_MS before", "D_MS after"], rows)
    return gold + plots(plot, table)


METRICS = {"E": {"loss": "loss", "rewards/margins": "margins", "rewards/accuracies": "accuracy"},
           "M": {"loss": "loss", "margin": "margins", "accuracy": "accuracy"}}


def losses(run):
    drawn, rows = [], []
    for kind, what in (("E", "DPO"), ("M", "RM")):
        found = training_lines(run, kind)
        drawn += [svg(mark(run, f"{kind}{i}"), f"{what} {name}",
                      lambda x, kind=kind, key=key: figures.plot_steps(x, run, kind, key))
                  for i, (key, name) in enumerate(METRICS[kind].items()) if found]
        rows += [[phase.removeprefix("round"), len(log), *(num(log[at][key]) for key in METRICS[kind]
                                                           for at in (0, -1))] for phase, log in found]
    head = ["phase", "steps", "loss: first", "last", "margins: first", "last", "accuracy: first", "last"]
    return plots(*drawn) + grid(head, rows)


def lengths(run):
    rows = [[name, *(num(np.percentile(x, q), 0) for q in (10, 50, 90)), num(x.mean(), 1)]
            for name, x in lengths_of(run)]
    plot = rows and svg(mark(run, "len"), "Tokens per response", lambda x: figures.plot_lengths(x, run))
    return plots(plot or "", grid(["PM", "10%", "median", "90%", "mean"], rows))


def margins(runs):
    """The panel of Δr, on one scale for all runs."""
    every = np.concatenate([s["margins"] for run in runs for s in m_steps(run)] or [[0, 1]])
    limits = every.min(), max(every.max(), every.min() + 1e-6)

    def panel(run):
        drawn = [svg(mark(run, f"dr{i}"), title(s), lambda x, s=s: figures.plot_margins(x, s, limits))
                 for i, s in enumerate(m_steps(run))]
        rows = [[title(s), s["comparisons"], s["kept"], s["comparisons"] - s["kept"], num(s["margin"]),
                 num(s["epsilon"]), ", ".join(f"{n} {why}" for why, n in sorted(s["dropped"].items())) or "–"]
                for s in m_steps(run)]
        head = ["M-step", "comparisons", "kept", "dropped", "mean Δr", "ε", "dropped because"]
        return plots(*drawn) + grid(head, rows) if rows else "<p>No M-step: nothing was compared.</p>"
    return panel


def accuracies(run):
    keys = ("accuracy_base", "accuracy_current", "length_slope")
    rows = [[g["policy"], g["rm"], *(num(g[key]) for key in keys)] for g in run["gold"]]
    return grid(["after", "RM in use", "on base PM’s answers", "on own answers", "length slope"], rows) or (
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
    if "judge" in run:
        facts.insert(1, f"gold {run['judge'](row):.3f}")
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
  --soft: #5d636e; --line: #e3e4e6; --good: #2c7a4b; --bad: #b1452f;
  --s0: #2f6fb5; --s1: #c8612a; --s2: #3c8d5a; --s3: #8a5bb1; --s4: #b03a5b; --s5: #7a6a1f }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --card: #1c1f23; --ink: #e3e5e8;
  --quiet: #7d838d; --soft: #a3a9b3; --line: #31353b; --good: #6cc08b; --bad: #ec8a72;
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
.wide { overflow-x: auto }
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

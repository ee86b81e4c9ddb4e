"""Read the figures of a run folder, and say in words whether the run worked.

Figures are over all rows of the files. Files are read row by row, so that of a run on 60,000 prompts only
numbers and a few texts are in memory. plots.py draws what is read here; report.py and eval.py show it.
"""
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from common.data import by_prompt, check_prompt, from_json, is_number, prompt_id, read_json
from common.parallel import Problem
from common.run import log_lines
from evals.stats import wilson

TEXTS = "response new old reason".split()  # fields whose names end in one of these words hold text
NUMBERS = "score tokens margin epsilon index gold form content r0 se n rate".split()
BASE = ("policy", "n", "win_rate", "reward_r0", "reward_r0_se", "tokens", "finished")
GOLD = (*BASE, "rm", "gold", "gold_se", "form", "content", "accuracy_base", "accuracy_current")
STATE = ("gold", "gold_se", "form", "content", "win_rate", "tokens", "reward_r0", "accuracy_base",
         "accuracy_current", "comparisons_right")  # the columns of a policy in the terminal's table
RESULTS = {"e1": "selection.json", "m": "rm", "e2": "selection.json"}  # the last result of each step
PARTS = ("sampling and scoring", "training", "model selection")        # the parts of a step's time

def stream(path, *fields):
    """Yield the rows of a JSONL file. Raise a Problem if the file is missing, a row is broken, or one of its
    `fields` is missing or of the wrong kind."""
    if not Path(path).exists():
        raise Problem(f"{path}: no such file, so this run is not complete")
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            row = from_json(line, path, number)
            for name in fields:
                if not isinstance(row, dict) or name not in row or not fits(name, row[name]):
                    raise Problem(f"{path}:{number}: no field {name!r} of the right kind")
            if "prompt" in fields:
                check_prompt(f"{path}:{number}", row["prompt"])
            yield row

def fits(name, value):
    """Return whether a field of this name may have this value."""
    word = name.rpartition("_")[2]
    return is_number(value) if word in NUMBERS else isinstance(value, str if word in TEXTS else object)

def load(folder, shown=0):
    """Return the contents of a run folder as a dict. Each step has the texts of its first `shown` prompts,
    which are a random sample because mt.py shuffles the prompts."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise Problem(f"{folder}: not a run folder (no run.json)")
    try:
        note = read_json(folder / "run.json")
        settings, versions = ({**note.get(key, {})} for key in ("settings", "versions"))
        run = dict(folder=folder, name=folder.resolve().name, settings=settings, versions=versions,
                   arm=arm(settings, note.get("script", "mt")), steps=steps_of(folder, shown),
                   seconds=seconds_of(folder),
                   open=any("sha256" not in entry for entry in note.get("results", {}).values()))
        for key, fields in (("metrics", ["phase"]), ("gold", GOLD), ("base", BASE)):
            path = folder / f"{key}.jsonl"
            run[key] = list(stream(path, *fields)) if path.exists() else []
        lines = run["gold"] or run["base"]
        states = [line for before, line in zip([{}, *lines], lines)  # after a stop, rounds repeat the line
                  if line | {"policy": ""} != before | {"policy": ""}]
        return run | dict(states=states, judge="gold" if run["gold"] else "reward_r0")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Problem(f"{folder}: not a run as mt.py writes it ({reason})") from None

def seconds_of(folder):
    """Return {step: {part: seconds}} of all E- and M-steps, by the parts in PARTS."""
    path, found = folder / "timings.jsonl", {}
    for line in log_lines(path):
        number, step, name, *_ = [*line["phase"].split("/"), "", ""]
        if step in RESULTS and name != "selection":  # selection contains other phases
            training = name == "checkpoints" or name.startswith("rm")
            part = PARTS[2 if name == "select" else 1 if training else 0]
            seconds = found.setdefault(f"{number}/{step}", dict.fromkeys(PARTS, 0.0))
            seconds[part] += line["seconds"]
    return found

def arm(settings, script):
    """Return the name of the variant that a run is, and the paper's names of its ablations."""
    names = {"update_rm": "fixed RM (iterative DPO)", "select": "no selection", "filter": "no filter"}
    pairs = settings.get("rm_pairs", "both")
    if settings.get("update_rm") is False:  # without an M-step there is nothing to filter or to train on
        del names["filter"]
        pairs = "both"
    parts = [script] * (script != "mt") + [names[key] for key in names if settings.get(key) is False]
    return ", ".join(parts + [f"M-step on {pairs}"] * (pairs != "both")) or "full method"

def steps_of(run, shown=0):
    """Return the finished E- and M-steps of a run folder as dicts, in order. `pm` and `rm` are the numbers of
    the policy and of the reward model that a step starts with."""
    rounds = [path for path in Path(run).glob("round*") if path.name.removeprefix("round").isdigit()]
    steps, pm, rm = [], 0, 0
    for round_folder in sorted(rounds, key=lambda path: int(path.name.removeprefix("round"))):
        for part, result in RESULTS.items():
            folder = round_folder / part
            if (folder / result).exists():
                step = (read_m_step if part == "m" else read_e_step)(folder, shown)
                steps.append(step | dict(phase=f"{round_folder.name}/{part}", pm=pm, rm=rm))
                rm += step["kind"] == "M"
                pm += step["kind"] == "E" and bool(step["chosen"])
    return steps

def read_e_step(folder, shown):
    choice, rows, texts, prompts = read_json(folder / "selection.json"), [], [], 0
    names = [*choice["win_rates"], choice["chosen"] or "step-0"]
    if not all(re.fullmatch(r"step-\d+", name) for name in names):
        raise Problem(f"{folder / 'selection.json'}: win_rates and chosen must name checkpoints step-N")
    for group in by_prompt(stream(
            folder / "samples.jsonl", "prompt", "response", "score", "tokens", "finished")):
        rows += [(row["score"], row["tokens"], row["finished"]) for row in group]
        prompts += 1
        if prompts <= shown:
            texts.append((group, []))
    if not rows:
        raise Problem(f"{folder / 'samples.jsonl'}: empty")
    rewards, lengths, finished = np.array(rows, float).T
    paired, pairs_of = Counter(), {prompt_id(group[0]["prompt"]): pairs for group, pairs in texts}
    for pair in stream(folder / "pairs.jsonl", "prompt", "chosen_index", "rejected_index", "reason"):
        prompt = prompt_id(pair["prompt"])
        paired[hash(prompt)] += 1  # a prompt may give several pairs
        pairs_of.get(prompt, []).append(pair)
    rates, before = choice["win_rates"], folder / "select" / "before.jsonl"
    return dict(kind="E", chosen=choice["chosen"], win_rates=rates, tau=choice.get("tau"),
                win_rate=max(rates.values(), default=None),
                judged=sum(1 for _ in stream(before)) if before.exists() else 0,
                prompts=prompts, pairs=paired.total(), paired=len(paired), texts=texts,
                reward=rewards.mean(), tokens=lengths.mean(), finished=finished.mean(), lengths=lengths)

def read_m_step(folder, shown):
    rows, texts = [], []
    for row in stream(folder / "comparisons.jsonl", "prompt", "new", "old", "new_score", "old_score",
                      "margin", "epsilon", "kept", "reason", "new_tokens", "old_tokens"):
        rows.append((row["margin"], row["kept"], row["new_tokens"]))
        if len(rows) <= shown:
            texts.append(row)
    if not rows:
        raise Problem(f"{folder / 'comparisons.jsonl'}: empty")
    margins, kept, tokens = map(np.array, zip(*rows))
    return dict(kind="M", kept=int(kept.sum()), comparisons=len(rows), margin=margins.mean(),
                epsilon=row["epsilon"], tokens=tokens.mean(), margins=margins, mask=kept.astype(bool),
                prompts=len(rows), texts=texts)

# ---------------------------------------------------------------- parts of a run
def e_steps(run):
    return [s for s in run["steps"] if s["kind"] == "E"]

def m_steps(run):
    return [s for s in run["steps"] if s["kind"] == "M"]

def title(step):
    number, part = step["phase"].removeprefix("round").split("/")
    return f"round {number} · {dict(e1='E(a)', m='M(b)', e2='E(c)')[part]}"

def training_lines(run, kind):
    """Return [(phase, its log lines)] of all trainings of policies (kind "E") or reward models (kind "M")."""
    key, found = {"E": "rewards/margins", "M": "mean_reward"}[kind], {}
    for row in run["metrics"]:
        if key in row:
            found.setdefault(row["phase"].rsplit("/", 1)[0], []).append(row)
    return list(found.items())

# ---------------------------------------------------------------- whether it worked
def with_interval(share, count):
    """Return a share of `count` as text, with its 95% interval by Wilson."""
    return "{:.3f} ({:.3f} to {:.3f})".format(share, *wilson(share, count)) if count else f"{share:.3f}"

def above(run, one, other):
    """Return whether the judge puts a state above another by more than two standard errors."""
    key = run["judge"]
    return one[key] - other[key] > 2 * math.hypot(one[f"{key}_se"], other[f"{key}_se"])

def verdict(run):
    """Return sentences that say what became of the policy, by whose account, and what to do next."""
    states, key = run["states"], run["judge"]
    if not states:
        return ("This run is not judged yet. Policies are judged when a run ends: on the embedded task by "
                "gold, else by the base reward model on the held-out prompts (not with --select false).")
    first, last, best = states[0], states[-1], max(states, key=lambda state: state[key])
    judge, by = ("gold", "") if key == "gold" else ("its reward", " by the base reward model’s account")
    start, peak, end = (f"{state[key]:.2f}" for state in (first, best, last))
    gentler = "a smaller --policy_lr" + " or --update_rm false" * bool(m_steps(run))
    if above(run, best, first) and above(run, best, last):
        return (f"The policy got better and then worse{by}: {judge} rose from {start} to {peak} in "
                f"{best['policy']} and fell to {end}. Use the policy of {best['policy']}, or try {gentler}.")
    if above(run, first, last):
        return (f"The policy got worse{by}: {judge} fell from {start} to {end}. Keep the base policy, and "
                f"try {gentler}.")
    if above(run, last, first):
        return (f"The policy got better{by}: {judge} rose from {start} to {end}. More --rounds may add to "
                "that.")
    return (f"The policy hardly changed{by}: {judge} went from {start} to {end}, within two standard errors. "
            "Try more prompts, more --rounds or a larger --policy_lr.")

def outcome(run):
    """Return a sentence that says how the run ended, or how far it is."""
    last = run["steps"][-1] if run["steps"] else {}
    if last.get("chosen", True) is None:
        low, high = wilson(last["win_rate"], last["judged"])
        inside = " That may be chance, since τ lies in the interval." * (low < last["tau"] < high)
        return (f"The run stopped in {title(last)}, because the best win rate, "
                f"{with_interval(last['win_rate'], last['judged'])}, is below τ = {last['tau']}.{inside}")
    rounds = run["settings"].get("rounds", 0)
    if run["open"] or not last.get("phase", "").startswith(f"round{rounds}/"):
        return f"The run is not finished: {len(run['steps'])} steps of --rounds {rounds} are done."
    return f"All {rounds} rounds are done." if rounds > 1 else "The round is done."

def warnings(run):
    """Return sentences about what the reader of the verdict should know besides."""
    states, found = run["states"], []
    if not states:
        return []
    first, last, best = states[0], states[-1], max(states, key=lambda state: state[run["judge"]])
    rates = [s["win_rate"] for s in e_steps(run) if s["chosen"] and s["win_rate"] is not None]
    if rates and rates[-1] > 0.5 > wilson(last["win_rate"], last["n"])[1]:
        judge = "gold" if run["judge"] == "gold" else "the base reward model"
        found.append(f"The reward model did not notice: it says that the last update won {rates[-1]:.1%} of "
                     f"prompts, while {judge} says that it wins {last['win_rate']:.1%} against the base.")
    if run["judge"] == "reward_r0":
        found.append("The first round optimised the base reward model itself. So only a benchmark or people "
                     "can say whether the answers got better.")
    elif above(run, best, last) and last["reward_r0"] > best["reward_r0"]:
        since = "From the start" if best is first else f"After {best['policy']}"
        found.append(f"{since} the base reward model was over-optimised: its reward rose from "
                     f"{best['reward_r0']:.2f} to {last['reward_r0']:.2f}, while gold fell.")
    if last["finished"] < 0.95:
        found.append(f"Only {last['finished']:.1%} of the last policy’s answers are finished. "
                     "--max_new_tokens cut off the others.")
    change = last["tokens"] / first["tokens"] - 1
    if abs(change) > 0.2:
        found.append(f"The answers are {abs(change):.0%} {'longer' if change > 0 else 'shorter'} than those "
                     "of the base. Check that this is what you want.")
    return found

# ---------------------------------------------------------------- what the terminal shows
def tables(run):
    """Return a run as text: a table of its steps, one of its policies if they are judged, and the verdict."""
    def cell(value):
        return "-" if value is None else value if isinstance(value, str) else f"{value:.3f}"

    steps = [["step", "sampled reward", "tokens", "finished", "pairs", "win rate", "outcome"]]
    for s in run["steps"]:
        if s["kind"] == "E":
            steps.append([s["phase"], f"{s['reward']:.3f}", f"{s['tokens']:.1f}", f"{s['finished']:.1%}",
                          str(s["pairs"]), f"{s['win_rate']:.3f}" if s["win_rates"] else "-",
                          f"policy: {s['chosen']}" if s["chosen"] else "discarded, run stopped"])
        else:
            steps.append([s["phase"], "", f"{s['tokens']:.1f}", "", f"{s['kept']}/{s['comparisons']}", "",
                          f"reward model; margin {s['margin']:+.3f}, epsilon {s['epsilon']:.3f}"])
    keys = ("policy", "rm", *STATE) if run["gold"] else (BASE[0], *BASE[2:])
    states = [[key.replace("_", " ") for key in keys],
              *([cell(state.get(key)) for key in keys] for state in run["states"])]
    lines = [f"\n{run['name']}: {run['arm']}"]
    for rows in [steps, states] if run["states"] else [steps]:
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += [*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), ""]
    return "\n".join([*lines, verdict(run), outcome(run), *warnings(run), ""])

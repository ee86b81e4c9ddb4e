"""Reads a run folder: its numbers, and what they say about whether the run worked.

Files are read row by row. Of a run on 60,000 prompts only the numbers and a few texts are held in memory; the
numbers are over all rows. plots.py draws them, report.py and eval.py show them.
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

TEXTS = ("response", "new", "old", "reason")  # the last words of the names of fields that hold text
NUMBERS = ("score", "tokens", "margin", "epsilon", "index", "gold", "r0", "se", "n", "rate")
BASE = ("policy", "n", "win_rate", "reward_r0", "reward_r0_se", "tokens", "finished")
GOLD = (*BASE, "rm", "gold", "gold_se", "accuracy_base", "accuracy_current", "length_slope")
RESULTS = {"e1": "selection.json", "m": "rm", "e2": "selection.json"}  # what each step of a round ends with
PARTS = ("sampling and scoring", "training", "model selection")        # of the time of a step

def stream(path, *fields):
    """Yield the rows of a JSONL file. A missing file, a broken row, and a row in which one of `fields` is
    missing or of the wrong kind are a Problem."""
    if not Path(path).exists():
        raise Problem(f"{path}: no such file; this is not a whole run")
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
    """Return what a run folder holds as a dict. Each step keeps the texts of its first `shown` prompts,
    which are a random sample because mt.py shuffles the prompts."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise Problem(f"{folder}: not a run folder (no run.json)")
    try:
        note = read_json(folder / "run.json")
        settings, versions = ({**note.get(key, {})} for key in ("settings", "versions"))
        run = dict(folder=folder, name=folder.resolve().name, settings=settings, versions=versions,
                   arm=arm(settings), steps=steps_of(folder, shown), seconds=seconds_of(folder))
        for key, fields in (("metrics", ["phase"]), ("gold", GOLD), ("base", BASE)):
            path = folder / f"{key}.jsonl"
            run[key] = list(stream(path, *fields)) if path.exists() else []
        lines = run["gold"] or run["base"]
        states = [line for before, line in zip([{}, *lines], lines)  # rounds after a stop repeat a line
                  if line | {"policy": ""} != before | {"policy": ""}]
        return run | dict(states=states, judge="gold" if run["gold"] else "reward_r0")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Problem(f"{folder}: not a run as mt.py writes it ({reason})") from None

def seconds_of(folder):
    """Return {step: {part: seconds}} of the E- and M-steps, with the parts named in PARTS."""
    path, found = folder / "timings.jsonl", {}
    for line in log_lines(path):
        number, step, name, *_ = [*line["phase"].split("/"), "", ""]
        if step in RESULTS and name != "selection":  # whose seconds are those of the phases within it
            training = name == "checkpoints" or name.startswith("rm")
            part = PARTS[2 if name == "select" else 1 if training else 0]
            seconds = found.setdefault(f"{number}/{step}", dict.fromkeys(PARTS, 0.0))
            seconds[part] += line["seconds"]
    return found

def arm(settings):
    """Return the paper's name of the ablation that these settings make."""
    off = [key for key in ("update_rm", "select", "filter") if settings.get(key) is False]
    if "update_rm" in off and "filter" in off:
        off.remove("filter")  # without an M-step there is nothing to filter
    names = {"update_rm": "fixed RM (iterative DPO)", "select": "no selection", "filter": "no filter"}
    return ", ".join(names[key] for key in off) or "full"

def steps_of(run, shown=0):
    """Return the finished E- and M-steps of a run folder as dicts, in order. `pm` and `rm` are the numbers of
    the models that a step begins with."""
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

# ---------------------------------------------------------------- what is asked of a run
def e_steps(run):
    return [s for s in run["steps"] if s["kind"] == "E"]

def m_steps(run):
    return [s for s in run["steps"] if s["kind"] == "M"]

def title(step):
    number, part = step["phase"].removeprefix("round").split("/")
    return f"round {number} · {dict(e1='E(a)', m='M(b)', e2='E(c)')[part]}"

def training_lines(run, kind):
    """Return [(phase, its log lines)] of the trainings of PMs (kind "E") or RMs (kind "M"), in order."""
    key, found = {"E": "rewards/margins", "M": "mean_reward"}[kind], {}
    for row in run["metrics"]:
        if key in row:
            found.setdefault(row["phase"].rsplit("/", 1)[0], []).append(row)
    return list(found.items())

# ---------------------------------------------------------------- whether it worked
def with_interval(share, count):
    """Return a share of `count` as text, with its 95% interval (Wilson)."""
    return "{:.3f} ({:.3f} to {:.3f})".format(share, *wilson(share, count)) if count else f"{share:.3f}"

def above(run, one, other):
    """Return whether a state is judged higher than another by more than twice the standard error."""
    key = run["judge"]
    return one[key] - other[key] > 2 * math.hypot(one[f"{key}_se"], other[f"{key}_se"])

def verdict(run):
    """Return a sentence that says what became of the policies, judged by gold or else by the base RM."""
    states, key = run["states"], run["judge"]
    if not states:
        return ("Nothing here says yet whether it worked: policies are judged when a run ends, without gold "
                "by the base reward model on the prompts of D_MS; with --select false there are none.")
    first, last, best = states[0], states[-1], max(states, key=lambda state: state[key])
    peak = f"; its best was {best[key]:.2f}, of {best['policy']}" * (best[key] > last[key])
    lead, verb = (("It harmed", "fell") if above(run, first, last) else
                  ("It went too far", "went") if above(run, best, last) else
                  ("It worked", "rose") if above(run, last, first) else ("It changed little", "went"))
    name = f"{lead}. Gold" if key == "gold" else "Reward under the base RM"
    return f"{name} {verb} from {first[key]:.2f} to {last[key]:.2f}{peak}."

def outcome(run):
    """Return a sentence that says how the run ended."""
    last = run["steps"][-1] if run["steps"] else {}
    if last.get("chosen", True) is None:
        low, high = wilson(last["win_rate"], last["judged"])
        inside = " (τ is within the interval)" * (low < last["tau"] < high)
        return (f"Stopped in {title(last)}: best win rate {with_interval(last['win_rate'], last['judged'])} "
                f"< τ = {last['tau']}{inside}; PM {last['pm']} stays.")
    rounds, of_a_round = run["settings"].get("rounds", 0), 2 + (run["settings"].get("update_rm") is not False)
    if len(run["steps"]) < rounds * of_a_round:
        return f"Unfinished: {len(run['steps'])} of {rounds * of_a_round} steps so far."
    return f"All {rounds} rounds are done." if rounds > 1 else "The round is done."

def warnings(run):
    """Return sentences about what a reader of the verdict should beware of."""
    states, found = run["states"], []
    if not states:
        return []
    first, last, best = states[0], states[-1], max(states, key=lambda state: state[run["judge"]])
    rates = [s["win_rate"] for s in e_steps(run) if s["chosen"] and s["win_rate"] is not None]
    if rates and rates[-1] > 0.5 > wilson(last["win_rate"], last["n"])[1]:
        found.append(f"Judges part: by the reward model in use the last update won {rates[-1]:.3f}, yet "
                     f"against the base this policy wins {with_interval(last['win_rate'], last['n'])}.")
    if run["judge"] == "reward_r0":
        found.append("The base RM was optimised, too: whether answers got better, a benchmark or people must "
                     "say.")
    elif above(run, best, last) and last["reward_r0"] > best["reward_r0"]:
        found.append(f"Since {best['policy']} the reward under RM 0 rose from {best['reward_r0']:.2f} to "
                     f"{last['reward_r0']:.2f}, while gold fell: over-optimisation.")
    if last["finished"] < 0.95:
        found.append(f"Only {last['finished']:.1%} of the last policy’s answers are finished: "
                     "--max_new_tokens cuts the others off.")
    change = last["tokens"] / first["tokens"] - 1
    if abs(change) > 0.2:
        found.append(f"Answers are {abs(change):.0%} {'longer' if change > 0 else 'shorter'} than the "
                     "base’s: is that what you wanted?")
    return found

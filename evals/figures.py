"""Figures of a run: the numbers that its files hold, and what they say. What plots.py and report.py show.

Files are streamed: of 60,000 prompts only the numbers and a few sampled texts are held. Numbers are over all
rows.
"""
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

import labels
from data import Problem, by_prompt, prompt_id
from evals.stats import wilson
from rows import from_json, is_number, read_json, read_selection
from run import phase_of

# ---------------------------------------------------------------- files, one row at a time
NUMBER = (int, float)
KINDS = {**dict.fromkeys(("response", "new", "old", "reason"), str), "index": int,
         **dict.fromkeys(("score", "tokens", "margin", "epsilon", "gold", "r0", "se", "n", "rate", "seconds"),
                         NUMBER)}
BASE = ("policy", "n", "win_rate", "reward_r0", "reward_r0_se", "tokens", "finished")
GOLD = (*BASE, "rm", "gold", "gold_se", "accuracy_base", "accuracy_current", "length_slope")


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
        for key, fields in (("metrics", ["phase"]), ("gold", GOLD), ("base", BASE)):
            path = folder / f"{key}.jsonl"
            run[key] = list(stream(path, *fields)) if path.exists() else []
        times = folder / "timings.jsonl"  # of which a kill may have cut a line
        lines = times.read_text(errors="replace").splitlines() if times.exists() else []
        run["timings"] = [json.loads(line) for line in lines if phase_of(line)]
        lines = run["gold"] or run["base"]
        states = [line for before, line in zip([{}, *lines], lines)
                  if line | {"policy": ""} != before | {"policy": ""}]  # none for rounds after a stop
        return run | {"states": states, "judge": "gold" if run["gold"] else "reward_r0"}
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
    results = {"e1": "selection.json", "m": "rm", "e2": "selection.json"}
    return [(f"{folder.name}/{part}", folder / part)
            for folder in sorted(rounds, key=lambda path: int(path.name.removeprefix("round")))
            for part, name in results.items()
            if (folder / part / name).exists() or part == "m" and labels.refused(folder / part)]


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
    rates, d_ms = choice["win_rates"], held_out(folder / "select", choice["win_rates"])
    return dict(phase=phase, kind="E", chosen=choice["chosen"], win_rates=rates, tau=choice.get("tau"),
                win_rate=max(rates.values(), default=None),
                judged=len(d_ms["after"]["lengths"]) if d_ms else 0, pairs=paired.total(),
                paired=len(paired), reward=scores.mean(), tokens=lengths.mean(), lengths=lengths,
                finished=finished.mean(), sample=sample, held_out=d_ms)


def held_out(folder, rates):
    """The PM before and the best checkpoint on D_MS, the same prompts in every step: mean reward, lengths,
    finished share."""
    files = {"before": folder / "before.jsonl",
             "after": folder / f"{max(rates, key=rates.get, default='none')}.jsonl"}
    if not all(file.exists() for file in files.values()):
        return None
    values = {at: np.array([(row["score"], row["tokens"], row["finished"])
                            for row in stream(file, "score", "tokens", "finished")]).T
              for at, file in files.items()}
    return {at: dict(reward=scores.mean(), lengths=lengths, finished=finished.mean())
            for at, (scores, lengths, finished) in values.items()}


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


def curves(run, kind):
    """`training_lines` without those that mislead: an epoch's last step, where it has less than half a batch,
    and DPO's first one, in which policy and reference are the same."""
    found = []
    for phase, rows in training_lines(run, kind):
        batch = rows[0].get("batch", 0)
        full = [row for row in rows if row.get("batch", batch) >= batch / 2]
        found.append((phase, full[kind == "E":] or rows))
    return found


def responses_of(run):
    """[(PM, its responses' lengths, their finished share)]: of the E-steps' samples; the last PM has only
    its answers on D_MS."""
    found = [(f"PM {s['pm']}", s["lengths"], s["finished"]) for s in e_steps(run)]
    last = run["steps"][-1] if run["steps"] else {}
    if last.get("chosen") and last["held_out"]:
        after = last["held_out"]["after"]
        found.append((f"PM {last['pm'] + 1}", after["lengths"], after["finished"]))
    return found


def seconds_of(run):
    """{E- or M-step: {part: seconds}}, and the parts' names."""
    parts, found = ("sampling and scoring", "training", "model selection"), {}
    for row in run["timings"]:
        number, step, name = (row["phase"] + "/").split("/")[:3]
        part = 2 if name == "select" else int(name == "checkpoints" or name.startswith("rm"))
        seconds = found.setdefault(f"{number}/{step}", dict.fromkeys(parts, 0.0))
        seconds[parts[part]] += row["seconds"]
    return found, parts


def times_dpo(run):
    """How many times as long the run took as DPO on the same pairs: as its E-steps' sampling, scoring and
    training alone. The paper says three to four."""
    found, (sampling, training, _) = seconds_of(run)
    dpo = sum(s[sampling] + s[training] for step, s in found.items() if not step.endswith("/m"))
    return sum(sum(s.values()) for s in found.values()) / dpo


# ---------------------------------------------------------------- whether it worked
def with_interval(share, count):
    """A share of `count` as text, with its 95% interval (Wilson)."""
    return "{:.3f} ({:.3f} to {:.3f})".format(share, *wilson(share, count)) if count else f"{share:.3f}"


def best_of(run):
    return max(run["states"], key=lambda state: state[run["judge"]])


def above(run, one, other):
    """Whether a state is judged higher than another by more than twice the standard error."""
    key = run["judge"]
    return one[key] - other[key] > 2 * math.hypot(one[f"{key}_se"], other[f"{key}_se"])


def verdict(run):
    """[sentences]: what became of the policies, judged by gold or else by the base RM; then what to beware
    of."""
    states, key = run["states"], run["judge"]
    if not states:
        return ["Nothing here says yet whether it worked: policies are judged when a run ends, without gold "
                "by the base reward model on the prompts of D_MS; with --select false there are none."]
    first, last, best = states[0], states[-1], best_of(run)
    peak = f"; its best was {best[key]:.2f}, of {best['policy']}" * (best[key] > last[key])
    lead, verb = (("It harmed", "fell") if above(run, first, last) else
                  ("It went too far", "went") if above(run, best, last) else
                  ("It worked", "rose") if above(run, last, first) else ("It changed little", "went"))
    name = f"{lead}. Gold" if key == "gold" else "Reward under the base RM"
    said = f"{name} {verb} from {first[key]:.2f} to {last[key]:.2f}{peak}."
    return [said, *warnings(run)]


def warnings(run):
    first, last, best, found = run["states"][0], run["states"][-1], best_of(run), []
    rates = [s["win_rate"] for s in e_steps(run) if s["chosen"] and s["win_rate"] is not None]
    if rates and rates[-1] > 0.5 > wilson(last["win_rate"], last["n"])[1]:
        found.append(f"Judges part: by the reward model in use the last update won {rates[-1]:.3f}, yet "
                     f"against the base this policy wins {with_interval(last['win_rate'], last['n'])}.")
    if run["judge"] == "reward_r0":
        found.append("The base RM was optimised, too: whether answers got better, a benchmark or people must "
                     "say (docs/curves.md).")
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


# ---------------------------------------------------------------- texts
HIDDEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]")


def visible(text):
    """A text in which what would not be seen, or would turn the writing round, is named."""
    return HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)

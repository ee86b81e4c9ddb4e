"""A run's clock: which phase begins, from what, what it took, and what is left of the run.

timings.jsonl in the run folder has a line for each phase that takes time and was finished. Times differ from
run to run, so they stand apart from metrics.jsonl, which is the same for equal runs.
"""
import functools
import inspect
import json
import time
from collections import Counter
from pathlib import Path
from shlex import quote

import torch

import models
import run
from data import Lines
from evals.plan import GPUS
from parallel import rank, say, world

STEPS = {"e1": "E-step", "m": "M-step", "e2": "second E-step"}
BEGUN = {}  # run folder -> the E- and M-steps that this process has worked on


def phase(o, path):
    """A phase's name, its result's path in the run folder: part of its seed and of its log lines."""
    return str(Path(path).relative_to(o.out).with_suffix(""))


def log_of(o, path):
    return run.open_log(Path(o.out) / "metrics.jsonl", phase(o, path), o.log_every, o.report_to)


def timed(work):
    """For a phase work(o, what it is made from …, path): a line when it begins and one when it ends, but none
    for the short ones of model selection."""
    @functools.wraps(work)
    def with_clock(*arguments, **more):
        given = inspect.signature(work).bind(*arguments, **more).arguments
        o, path = given["o"], Path(given["path"])
        if run.exists(path):
            return work(*arguments, **more)
        going_on = any(path.parent.glob(f"*{path.stem}.*"))  # what an attempt before has left
        speaks = rank() == 0 and path.parent.name != "select"
        if speaks:
            say_step(o, path)
            made_from = (f"{name} {str(value).removeprefix(f'{o.out}/')}"
                         + (f" ({len(Lines(value))} rows)" if Path(value).is_file() else "")
                         for name, value in given.items()
                         if name in ("policy", "rm", "prompts", "pairs", "preferences"))
            say(f"{phase(o, path)}: {'goes on, ' * going_on}from {', '.join(made_from)}")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.time()
        result = work(*arguments, **more)
        if rank() == 0:
            write_time(o, path, time.time() - start, going_on, speaks)
        return result
    return with_clock


def say_step(o, path):
    """Once per E- or M-step: what it is, and an estimate of what is left."""
    number, step = phase(o, path).split("/")[:2]
    begun, spent = BEGUN.setdefault(Path(o.out).resolve(), []), Counter()
    for row in timings(o):
        spent["/".join(row["phase"].split("/")[:2])] += row["seconds"]
    if (number, step) in begun or step not in STEPS:
        return
    before = [seconds for name, seconds in spent.items() if name != f"{number}/{step}"]
    left, estimate = o.rounds * (2 + o.update_rm) - len(before), ""
    if before and left > 0:
        estimate = (f"; at most {left} step{'s' * (left > 1)} left, about "
                    f"{in_words(left * sum(before) / len(before))} if they take as long as those before")
    going_on = "going on: " * bool(spent and not begun)
    say(f"{going_on}round {number.removeprefix('round')}, {STEPS[step]}{estimate}")
    begun.append((number, step))


def write_time(o, path, seconds, going_on, speaks):
    """Tokens: of the responses that were sampled, or of the pairs that were trained on."""
    training = path.suffix != ".jsonl"
    rows = Lines(Path(o.out) / "metrics.jsonl" if training else path)
    tokens = sum(row.get("num_tokens", 0) for row in rows
                 if row["phase"] == phase(o, path) and row.get("step") == row.get("steps")) \
        if training else sum(row["tokens"] for row in rows)
    line = {"phase": phase(o, path), "seconds": round(seconds, 3)}
    if tokens and not going_on:  # else a part of them was made in other seconds
        line |= {"tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}
        if training and (peak := peak_flops()):
            folder = o.policy if path.name == "checkpoints" else o.rm
            line["mfu"] = round(6 * models.parameters(folder) * tokens / seconds / world() / peak, 4)
    if torch.cuda.is_available():
        line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    with open(Path(o.out) / "timings.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if speaks:
        total = sum(row["seconds"] for row in timings(o))
        speed = f", {tokens / seconds:.0f} tokens a second" if "tokens" in line else ""
        say(f"{phase(o, path)}: {in_words(seconds)}{speed}, {seconds / total:.0%} of the run so far")


def peak_flops():
    """Of this process's GPU in bf16, by the maker; None: unknown."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((flops for gpu, (_, flops, _) in GPUS.items() if gpu in name), None)


def timings(o):
    """The lines of timings.jsonl, without what a kill has cut."""
    path = Path(o.out) / "timings.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if run.phase_of(line)]


def in_words(seconds):
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds >= 2 * s), (1, "s"))
    return f"{seconds / size:.{int(size > 1)}f} {unit}"


def say_end(o):
    """Where the time went, where the models are, and what to do with them."""
    spent, kinds = Counter(), {"checkpoints": "policy training", "rm": "reward model training"}
    for row in timings(o):
        spent[kinds.get(row["phase"].rsplit("/", 1)[-1], "sampling and scoring")] += row["seconds"]
    total = sum(spent.values())
    say(f"time: {in_words(total)}" + "".join(f", {kind} {s / total:.0%}" for kind, s in spent.items()))
    policy, rm = Path(o.out) / "policy", Path(o.out) / "rm"
    say(f"policy: {policy} (a link to {policy.resolve()})\nreward model: {rm} (a link to {rm.resolve()})")
    prompts = Path(o.out) / "prompts" / ("select.jsonl" if o.select_prompts else "s0.jsonl")
    prompts, policy, base, rm, out = (quote(str(path)) for path in (prompts, policy, o.policy, o.rm, o.out))
    words = f"--prompts {prompts} --max_new_tokens {o.max_new_tokens} --out {out}-next"
    say(f"next:\n  python sampler.py --model {policy} {words}.jsonl\n"
        f"  python eval.py winrate --policy {policy} --baseline {base} --rm {rm} {words}")

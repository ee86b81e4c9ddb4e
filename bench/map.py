"""Measure where the M-step helps: the gold of the full method above that of a fixed reward model, in worlds
around that of the embedded task.

    python bench/map.py                     # all worlds, steps and arms, seeds 41 to 48: hours on two cores
    python bench/map.py --skill 1 --labellers form --steps 2e-5 --seeds 1 2 --json some.jsonl
    python bench/map.py --table             # the tables and the figure, without new runs

A point of the map is a world (toy.SKILL: how far the writers' skill lies apart, toy.LABELLERS: what r_0's
labellers look at) and a learning rate of the E-step. No run has model selection. Two go on at a time, in
runs/map/. The row of every run goes to docs/data/map.jsonl. From these rows the tables are made, and the
figure beside them, map.svg.

What a user could know without gold, from 800 labelled pairs of the first round's own answers: how often
log π_t/π_{t−1} orders a pair as its label does, and how often the reward models before and after the M-step
do. Labels are noisy, and their labellers look at all that gold looks at.
"""
import argparse
import itertools
import json
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
from arms import ROUNDS, command, made_by_this_code, mean_and_error  # noqa: E402

from common import toy  # noqa: E402
from common.data import by_prompt, load_tokenizer, read_jsonl, write_jsonl  # noqa: E402
from common.models import context_of, load_policy  # noqa: E402
from common.packing import collate, pair_rows  # noqa: E402
from common.parallel import device, replicate  # noqa: E402
from dpo import ResponseLogps  # noqa: E402
from evals import figures  # noqa: E402
from evals.agreement import disagreement  # noqa: E402
from evals.rewardbench import judge_pairs  # noqa: E402
from evals.stats import bootstrap, standard_error  # noqa: E402

SKILL, LABELLERS = (0, 0.5, 1), ("all", "form")
STEPS = (toy.SETTINGS["policy_lr"], toy.SETTINGS["policy_lr"] / 2)
ARMS = {  # name -> flags of mt.py
    "fixed": ["--update_rm", "false"],
    "full": [],
    "comparisons": ["--rm_pairs", "comparisons"],
}
POINT = ("skill", "labellers", "step")  # the fields of a row that say which point it is of
PREDICTORS = ("news", "policy", "rm_before", "gain_on_own", "kept", "disagreement", "comparisons_right")

def run(skill, labellers, step, arm, seed):
    """Return the row of a run, which is made if it is not there."""
    folder = HOME / "runs" / "map" / f"skill{skill:g}-{labellers}"
    out = folder / f"{arm}-{step:g}-{seed}"
    if not (out / "gold.jsonl").exists() or not made_by_this_code(out):
        folder.mkdir(parents=True, exist_ok=True)
        command("bench.point", "--rounds", ROUNDS, "--seed", seed, "--out", out, "--policy_lr", step,
                "--select", "false", *ARMS[arm], cwd=folder,
                WORLD=json.dumps({"SKILL": skill, "LABELLERS": labellers}))
    lines = read_jsonl(out / "gold.jsonl")
    row = dict(skill=skill, labellers=labellers, step=step, arm=arm, seed=seed,
               **{key: [line[key] for line in lines] for key in ("gold", "form", "content")})
    if arm != "fixed":
        found = figures.load(out)
        row |= dict(own=own_answers(out),
                    kept=[m["kept"] / m["comparisons"] for m in figures.m_steps(found)],
                    comparisons_right=[line["comparisons_right"] for line in lines[1:]],
                    disagreement=[*disagreement(found).values()][::2])  # of each round's first E-step
    print(f"{out} is complete", flush=True)
    return row

def own_answers(out):
    """Return how often the labels of pairs of the new policy's answers in the first round agree with
    log π_t/π_{t−1}, and with the reward models before and after the M-step."""
    settings, folder = json.loads((out / "run.json").read_text())["settings"], out / "round1"
    pairs = []
    for prompt, answers in draw_two_answers(read_jsonl(folder / "e2" / "samples.jsonl"), 800):
        better = label(prompt, answers)
        pairs.append(dict(prompt=prompt, chosen=answers[better], rejected=answers[1 - better]))
    margins = policy_margins(str(folder / "e1/policy"), settings["policy"], pairs, 32)
    rights = [judge_pairs(str(rm), pairs, 32, 10**6)[1] for rm in (settings["rm"], folder / "m/rm")]
    return dict(policy=float((margins > 0).mean()),
                **{name: float(right.mean()) for name, right in zip(("rm_before", "rm_after"), rights)})

def policy_margins(new_policy, old_policy, pairs, batch):
    """Return log π_new/π_old of the chosen answer minus that of the rejected one, in nats, for each pair that
    fits into the context (N,). Policies are folders, and have the same tokenizer. A reward model that is
    trained for long on "the new answer is better" would learn these margins."""
    rows, _ = pair_rows(load_tokenizer(new_policy), pairs, context_of(new_policy), policy=True)
    margins = []
    for folder in (new_policy, old_policy):
        policy = ResponseLogps(replicate(load_policy(folder)))
        with torch.inference_mode():
            logps = torch.cat([policy(collate(rows[at:at + batch], device()))
                               for at in range(0, len(rows), batch)])
        margins.append((logps[::2] - logps[1::2]).cpu().numpy())
    return margins[0] - margins[1]

def draw_two_answers(samples, count):
    """Return [(prompt, [answer, answer])]: two different answers, drawn, to each of up to `count` prompts."""
    found = []
    for group in by_prompt(samples):
        answers = sorted({row["response"] for row in group})
        if len(answers) > 1:
            found.append((group[0]["prompt"], answers))
    draw = random.Random(len(found))
    found = draw.sample(found, min(count, len(found)))
    return [(prompt, draw.sample(answers, 2)) for prompt, answers in found]

def label(prompt, answers):
    """Return which of two answers gold prefers, 0 or 1, with the noise that r_0's labels have. The same
    question always has the same label."""
    first, second = (toy.gold(prompt, answer) for answer in answers)
    chance = 1 / (1 + math.exp((first - second) / toy.LABEL_NOISE))  # of the second
    return int(random.Random(str(dict(prompt=prompt, answers=answers, chosen=None))).random() < chance)

# ---------------------------------------------------------------- tables
def name_of(row):
    """The name of the point that a row is of."""
    looked = {"all": "all", "form": "form alone"}[row["labellers"]]
    return f"skill {row['skill']:g}, labels of {looked}, step {row['step']:g}"

def by_point(rows):
    """Return {name of the point: {arm: {seed: row}}}, in the order of POINT's values."""
    found = {}
    for row in sorted(rows, key=lambda row: (row["skill"], row["labellers"], -row["step"], row["seed"])):
        found.setdefault(name_of(row), {}).setdefault(row["arm"], {})[row["seed"]] = row
    return found

def gains(arms, arm, key="gold"):
    """Return (seeds, rounds): how far an arm's gold, or a part of it, is above that of a fixed reward model
    with the same seed."""
    return np.array([np.subtract(row[key], arms["fixed"][seed][key])[1:]
                     for seed, row in arms.get(arm, {}).items() if seed in arms.get("fixed", {})])

def table(*heads):
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")

def tables(rows):
    """Print the three tables of these rows."""
    points, rounds = by_point(rows), [f"round {n + 1}" for n in range(ROUNDS)]
    table("point", "arm", "seeds", "base", *rounds, "form, last", "content: base", *rounds)
    for point, arms in points.items():
        for arm, runs in arms.items():
            gold, form, content = (np.array([row[key] for row in runs.values()])
                                   for key in ("gold", "form", "content"))
            cells = [*gold.T, form.T[-1], *content.T]
            print(f"| {point} | {arm} | {len(runs)} | {' | '.join(map(mean_and_error, cells))} |")

    table("point", "arm", *(f"gold above fixed, {name}" for name in rounds),
          *(f"content above fixed, {name}" for name in rounds))
    groups = {point: [point] for point in points} | {
        f"mean of {part}": [point for point in points if part in point.split(", ")]
        for part in dict.fromkeys(part for point in points for part in point.split(", "))}
    for name, members in groups.items():
        for arm in [*ARMS][1:]:
            found = [[gains(points[point], arm, key) for point in members] for key in ("gold", "content")]
            if len({values.shape for values in found[0]}) == 1 and len(found[0][0]):  # all have the seeds
                cells = [cell for some in found for cell in np.mean(some, 0).T]
                print(f"| {name} | {arm} | {' | '.join(map(mean_and_error, cells))} |")

    table("point", "arm", "gain, round 1", "gain, round 3", *(name.replace("_", " ") for name in PREDICTORS))
    for arm in [*ARMS][1:]:
        known = {point: (gains(arms, arm)[:, [0, -1]], predictors(arms, arm))
                 for point, arms in points.items() if len(gains(arms, arm))}
        for point, (gain, found) in known.items():
            cells = [f"{column.mean():.3f} ± {standard_error(column):.3f}" for column in found.T]
            print(f"| {point} | {arm} | {' | '.join([*map(mean_and_error, gain.T), *cells])} |")
        for n, name in ((0, "round 1"), (1, "round 3")) if len(known) > 2 else ():
            both = [np.column_stack([gain[:, n], found]) for gain, found in known.values()]
            for what, values in (("points", [rows.mean(0, keepdims=True) for rows in both]), ("runs", both)):
                cells = [rank_correlation(values, place) for place in range(1, 1 + len(PREDICTORS))]
                print(f"| rank correlation with the gain in {name}, over {what} | {arm} | | "
                      f"| {' | '.join(cells)} |")

def predictors(arms, arm):
    """Return (seeds, predictors): what was known after the first round of each run of an arm."""
    def of(row):
        own = row["own"]
        return (own["policy"] - own["rm_before"], own["policy"], own["rm_before"],
                own["rm_after"] - own["rm_before"], row["kept"][0], row["disagreement"][0],
                row["comparisons_right"][0])
    return np.array([of(row) for seed, row in arms[arm].items() if seed in arms["fixed"]])

def rank_correlation(points, place):
    """Return Spearman's rank correlation between the first and another column of a list of arrays, which are
    the rows of one point each, as text with its interval. The bootstrap draws whole points, because the runs
    of a point are alike."""
    def of(chosen):
        rows = np.vstack([points[at] for at in chosen])
        return spearman(rows[:, 0], rows[:, place])
    low, high = bootstrap(of, len(points))
    return f"{of(range(len(points))):+.2f} ({low:+.2f} to {high:+.2f})"

def spearman(x, y):
    ranks = [np.sign(np.subtract.outer(values, values)).sum(1) for values in (x.round(9), y.round(9))]
    return np.corrcoef(*ranks)[0, 1]  # ties share a rank

# ---------------------------------------------------------------- the figure
WHAT = {"full": "comparisons and ranked pairs", "comparisons": "comparisons alone"}

def draw(rows, path):
    """Draw each point as a row of cells, one for each arm and round: how far gold is above a fixed reward
    model's. Green is a gain and red a loss, pale where it is within two standard errors."""
    import matplotlib
    from matplotlib.figure import Figure
    points = by_point(rows)
    figure = Figure(figsize=(11, 0.42 * len(points) + 1.3), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, arm in zip(axes, [*ARMS][1:]):
        for y, arms in enumerate(points.values()):
            for x, gain in enumerate(gains(arms, arm).T):
                mean, sure = gain.mean(), abs(gain.mean()) > 2 * standard_error(gain)
                colour = "#2c7a4b" if mean > 0 else "#b1452f"
                axis.broken_barh([(x + 0.02, 0.96)], (y + 0.04, 0.92), color=colour, linewidth=0,
                                 alpha=0.9 if sure else 0.2)
                axis.text(x + 0.5, y + 0.5, f"{mean:+.2f}", ha="center", va="center", fontsize=11,
                          weight="bold" if sure else "normal", color="white" if sure else "#22252b")
        axis.set(xlim=(0, ROUNDS), ylim=(len(points), 0), title=f"M-step on {WHAT[arm]}")
        axis.set_xticks(np.arange(ROUNDS) + 0.5, [f"round {n + 1}" for n in range(ROUNDS)])
        axis.set_yticks(np.arange(len(points)) + 0.5, points)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "map"}):  # the same file every time
        figure.savefig(path, metadata={"Date": None})

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skill", type=float, nargs="+", default=SKILL)
    parser.add_argument("--labellers", nargs="+", default=LABELLERS, choices=LABELLERS)
    parser.add_argument("--steps", type=float, nargs="+", default=STEPS)
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(41, 49))
    parser.add_argument("--json", type=Path, default=HOME / "docs" / "data" / "map.jsonl")
    parser.add_argument("--table", action="store_true", help="print the tables without new runs")
    o = parser.parse_args()
    rows = read_jsonl(o.json) if o.json.exists() else []
    if not o.table:
        def work(seed, skill, labellers):  # one after the other, because they share their base models
            return [run(skill, labellers, step, arm, seed)
                    for step, arm in itertools.product(o.steps, o.arms)]
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(work, *place) for place in itertools.product(o.seeds, o.skill, o.labellers)]
        new = [row for job in jobs for row in job.result()]
        keys = {tuple(row[name] for name in (*POINT, "arm", "seed")) for row in new}
        rows = [row for row in rows if tuple(row[name] for name in (*POINT, "arm", "seed")) not in keys] + new
        write_jsonl(o.json, rows)
    if not rows:
        parser.error(f"{o.json} has no rows yet; run this without --table")
    tables(rows)
    draw(rows, o.json.with_suffix(".svg"))

if __name__ == "__main__":
    main()

"""Measure where the M-step helps: the gold of the full method above that of a fixed reward model, at points
around the embedded task.

    python bench/map.py                        # fixed and full at all points, seeds 1 to 8: hours
    python bench/map.py --arms fixed full lighter --points base "taste 1.5" --seeds 1 2
    python bench/map.py --table                # print the tables without new runs

Two runs go on at a time, in runs/map/POINT/ARM-SEED. The row of every run goes to docs/data/map.jsonl, and
the tables are made from these rows. They include arms that only bench/map.py at commit 91c20a3 can run.

The first table has the gains. The second has what a user could know without gold: r_0's accuracy and Brier
score on 300 held-out labelled pairs, and five figures of the full method's first round. These are the win
rate, the share of comparisons kept, the disagreement of policy and reward model, and how many more pairs the
new reward model orders as their labels do, of the held-out ones and of the new policy's own answers. The
third table has the accuracy of the reward models before and after every M-step on the policy's own answers.
"""
import argparse
import json
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
from arms import ROUNDS, command, made_by_this_code, mean_and_error  # noqa: E402

import reward  # noqa: E402
from common import toy  # noqa: E402
from common.data import by_prompt, read_jsonl, read_pairs, write_jsonl  # noqa: E402
from evals import figures  # noqa: E402
from evals.agreement import disagreement  # noqa: E402
from evals.rewardbench import judge_pairs  # noqa: E402

POINTS = {  # name -> constants of point.py
    "base": {},
    **{f"labels {n}": {"labels": n} for n in (500, 1500, 4500, 9000)},
    **{f"taste {nats}": {"taste": nats} for nats in (0.5, 1.5)},
    **{f"step {lr}": {"policy_lr": lr} for lr in (2e-5, 8e-5)},
    "best chosen": {"rule": "best"},
    "own body": {"own_body": True},
    **{f"labels {n}, taste 1.5": {"labels": n, "taste": 1.5} for n in (500, 9000)},  # complete a grid
}
ARMS = {  # name -> (flags of mt.py, constants of point.py)
    "fixed": (["--update_rm", "false"], {}),
    "full": ([], {}),
    "lighter": (["--rm_lr", 1e-4], {}),  # a fifth of the embedded task's
    "one M-step": ([], {"m_steps": 1}),
    "like length": ([], {"alike": True}),
    "gold labels": ([], {"gold": True}),
    "restart": ([], {"restart": True}),
}
PREDICTORS = ("accuracy", "brier", "win_rate", "kept", "disagreement", "gain_on_labels", "gain_on_own")

def run(point, arm, seed):
    """Return the row of a run, which is made if it is not there: its gold after each round, the accuracies on
    its policies' own answers and, for the full method, the predictors."""
    folder = HOME / "runs" / "map" / point.replace(", ", "-").replace(" ", "")
    out = folder / f"{arm.replace(' ', '-')}-{seed}"
    if not (out / "gold.jsonl").exists() or not made_by_this_code(out):
        folder.mkdir(parents=True, exist_ok=True)
        flags, how = ARMS[arm]
        command("bench.point", "--rounds", ROUNDS, "--seed", seed, "--out", out, *flags, cwd=folder,
                POINT=json.dumps(POINTS[point] | how))
    print(f"{out} is complete", flush=True)
    row = dict(point=point, **POINTS[point], arm=arm, seed=seed,
               gold=[line["gold"] for line in read_jsonl(out / "gold.jsonl")])
    own = accuracy_on_own_answers(out)
    row |= {"own": own} if any(own) else {}
    if arm != "full":
        return row
    return row | predictors(out) | {"gain_on_own": own[0][1] - own[0][0] if own[0] else None}

def base_models_of(out):
    """Return the folder of the base models that a run started from."""
    return Path(json.loads((out / "run.json").read_text())["settings"]["rm"]).parent

def predictors(out):
    """Return what a user could know of a run without gold, {name: figure}, but for gain_on_own."""
    found = figures.load(out)
    held_out = read_pairs(base_models_of(out) / "held_out" / "preferences.jsonl")
    first, margins = found["steps"][0], margins_of(base_models_of(out) / "rm", held_out)
    new = out / "round1" / "m" / "rm"
    after = margins_of(new, held_out) if new.exists() else margins
    compared = next((step for step in found["steps"] if step["kind"] == "M"), None)
    return dict(
        accuracy=float((margins > 0).mean()), brier=float(((1 / (1 + np.exp(margins)))**2).mean()),
        win_rate=first["win_rate"], disagreement=next(iter(disagreement(found).values())),
        kept=compared and compared["kept"] / compared["comparisons"],
        gain_on_labels=float((after > 0).mean() - (margins > 0).mean()))

def accuracy_on_own_answers(out):
    """Return [before, after] for each round, or None where there was no M-step: the share of labelled pairs
    of the new policy's answers that the reward models before and after the M-step order as the labels do. The
    pairs are those of `draw_two_answers` for up to 800 prompts of the round's second E-step."""
    rm, found = base_models_of(out) / "rm", [None] * ROUNDS
    for new in sorted(out.glob("round*/m/rm")):
        pairs = []
        for prompt, answers in draw_two_answers(read_jsonl(new.parents[1] / "e2" / "samples.jsonl"), 800):
            better = label(prompt, answers)
            pairs.append(dict(prompt=prompt, chosen=answers[better], rejected=answers[1 - better]))
        found[int(new.parents[1].name.removeprefix("round")) - 1] = [
            float(judge_pairs(str(folder), pairs, 32, 10**6)[1].mean()) for folder in (rm, new)]
        rm = new
    return found

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

def margins_of(folder, pairs):
    """Return a reward model's margins, chosen minus rejected (N,), on labelled pairs."""
    model, tokenizer = reward.load(str(folder))
    return np.diff(reward.score_answers(model, tokenizer, [
        (pair["prompt"], [pair["rejected"], pair["chosen"]]) for pair in pairs], 32))[:, 0]

# ---------------------------------------------------------------- tables
def gains(rows, point, arm):
    """Return (seeds, rounds): how far an arm's gold is above a fixed reward model's with the same seed."""
    gold = {(row["arm"], row["seed"]): row["gold"] for row in rows if row["point"] == point}
    seeds = sorted(seed for name, seed in gold if name == arm and ("fixed", seed) in gold)
    return np.array([np.subtract(gold[arm, seed], gold["fixed", seed])[1:] for seed in seeds])

def table(*heads):
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")

def tables(rows):
    """Print the three tables of these rows."""
    by_arm = {}  # (point, arm) -> rows, in the order of their seeds
    for row in sorted(rows, key=lambda row: row["seed"]):
        by_arm.setdefault((row["point"], row["arm"]), []).append(row)
    arms = [*ARMS, *sorted({row["arm"] for row in rows} - {*ARMS})]  # these, and those that only rows have
    names = [(point, arm) for point in POINTS for arm in arms if (point, arm) in by_arm]
    rounds = [f"round {n + 1}" for n in range(ROUNDS)]

    table("point", "arm", "seeds", *rounds, "gold: fixed, arm")
    for point, arm in names:
        if arm != "fixed":
            above = gains(rows, point, arm)
            last = [np.mean([row["gold"][-1] for row in by_arm[point, name]]) for name in ("fixed", arm)]
            print(f"| {point} | {arm} | {len(above)} | {' | '.join(map(mean_and_error, above.T))} | "
                  f"{last[0]:.2f}, {last[1]:.2f} |")

    table("point", "gain", *(name.replace("_", " ") for name in PREDICTORS))
    full = [point for point, arm in names if arm == "full"]
    gain = {point: gains(rows, point, "full")[:, -1] for point in full}
    known = {point: np.array([[row.get(name) for name in PREDICTORS] for row in by_arm[point, "full"]], float)
             for point in full}  # (seeds, predictors); NaN where it was not measured, or nothing was compared
    means = np.array([np.ma.masked_invalid(known[point]).mean(0).filled(np.nan) for point in full])
    for point, values in zip(full, means):
        cells = ["" if np.isnan(value) else f"{value:.3f}" for value in values]
        print(f"| {point} | {gain[point].mean():+.2f} | {' | '.join(cells)} |")
    over = [spearman([gain[point].mean() for point in full], values) for values in means.T]
    print(f"| rank correlation, over points | | {' | '.join(f'{value:+.2f}' for value in over)} |")
    within = [[spearman(gain[point], known[point][:, n]) for point in np.array(full)[~np.isnan(column)]]
              for n, column in enumerate(means.T)]
    print(f"| over the seeds of a point, mean | | {' | '.join(map(mean_and_error, within))} |")

    table("point", "arm", *rounds)
    for point, arm in names:
        own = [row["own"] for row in by_arm[point, arm] if "own" in row]
        if own:
            steps = ([steps[n] for steps in own if steps[n]] for n in range(ROUNDS))
            print(f"| {point} | {arm} | {' | '.join(map(before_and_after, steps))} |")

def before_and_after(steps):
    """Return the means over the seeds of `own` in one round, as text. The rows of commit 91c20a3 have a third
    figure, which is not shown."""
    if not steps:
        return ""
    before, after = np.array([step[:2] for step in steps]).mean(0)
    return f"{before:.3f} → {after:.3f}"

def spearman(x, y):
    """Return the rank correlation of two lists (Spearman), without the places where y is NaN."""
    x, y = np.array([x, y])[:, ~np.isnan(y)].round(9)
    ranks = [np.sign(np.subtract.outer(values, values)).sum(1) for values in (x, y)]  # ties share a rank
    return np.corrcoef(*ranks)[0, 1]

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", default=POINTS, choices=POINTS)
    parser.add_argument("--arms", nargs="+", default=["fixed", "full"], choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 9))
    parser.add_argument("--json", type=Path, default=HOME / "docs" / "data" / "map.jsonl")
    parser.add_argument("--table", action="store_true", help="print the tables without new runs")
    o = parser.parse_args()
    rows = read_jsonl(o.json) if o.json.exists() else []
    if not o.table:
        def work(point, seed):  # arms run one after the other, because they share their base models
            return [run(point, arm, seed) for arm in ARMS if arm in o.arms]
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(work, point, seed) for seed in o.seeds for point in o.points]
        new = [row for job in jobs for row in job.result()]
        keys = {(row["point"], row["arm"], row["seed"]) for row in new}
        rows = [row for row in rows if (row["point"], row["arm"], row["seed"]) not in keys] + new
        write_jsonl(o.json, rows)
    tables(rows)

if __name__ == "__main__":
    main()

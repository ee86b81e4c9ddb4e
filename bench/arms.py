"""Run the ablations and variants on the embedded task with several seeds, as for docs/data/arms.md.

    python bench/arms.py --json arms.jsonl             # all arms, seeds 1 to 8: hours
    python bench/arms.py --arms full "fixed RM" sppo --seeds 1 2 3 4

An arm is mt.py with some flags or a script of variants/. Variants of the E-step run without M-steps, to be
compared with "fixed RM". Two runs go on at a time, with one thread each, in runs/arms/. A finished run is not
done again, and one that other code has made is refused. Where a run stopped, its last policy counts for the
rounds that follow. Seconds are the wall time of a whole run, without the base models and with another run
beside it. If the run was interrupted, they are those of its last attempt.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
from common import toy  # noqa: E402
from common.data import read_jsonl, write_jsonl  # noqa: E402
from common.run import claim, code_of, write_text  # noqa: E402
from evals import gold  # noqa: E402
from mt import Options  # noqa: E402

ROUNDS = 3
ARMS = {
    "full": [],
    "fixed RM": ["--update_rm", "false"],
    "fixed RM, no selection, no stop": ["--update_rm", "false", "--select", "false"],
    "no selection": ["--select", "false"],
    "no filter": ["--filter", "false"],
    "comparisons alone": ["--rm_pairs", "comparisons"],
    "ranked pairs alone": ["--rm_pairs", "ranked"],
    "offline DPO": None,  # see `offline_dpo`
    **dict.fromkeys(["online_dpo", "dpo_fixed_reference", "ipo", "simpo"], ["--update_rm", "false"]),
}
VARIANTS = sorted(path.stem for path in HOME.glob("variants/*.py") if "launch(mt.main" in path.read_text())
ARMS |= {name: [] for name in VARIANTS if name not in ARMS}
COMPARED_WITH = {"fixed RM": range(1, ROUNDS + 1), "offline DPO": [ROUNDS]}  # arm -> after which rounds
LAST_ROUND = {"win rate against base": "win_rate", "tokens": "tokens",  # column -> field of gold.jsonl
              "RM accuracy, own answers": "accuracy_current", "comparisons right": "comparisons_right",
              "seconds": "seconds"}

def command(script, *words, cwd=None, **more):
    """Run a script or module of the project with `words` as its command line, in the folder `cwd`. more:
    environment variables. If the run fails, what it wrote to stderr is raised as a RuntimeError."""
    script = [str(HOME / script)] if script.endswith(".py") else ["-m", script]
    path = os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *script, *map(str, words)], capture_output=True, text=True,
                          cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more)
    if done.returncode:
        raise RuntimeError(done.stderr)

def run(arm, seed):
    """Return the lines of gold.jsonl of an arm's run, which is made if it is not there. The last line gets
    the seconds that the whole run took."""
    out = Path("runs") / "arms" / f"{arm.replace(',', '').replace(' ', '-')}-seed{seed}"
    seconds, began = out / "seconds.json", time.time()
    if not (out / "gold.jsonl").exists() or not made_by_this_code(out):
        if arm == "offline DPO":
            offline_dpo(out, seed)
        else:
            command(f"variants.{arm}" if arm in VARIANTS else "mt.py", "--rounds", ROUNDS, "--seed", seed,
                    "--out", out, *ARMS[arm])
        write_text(seconds, json.dumps(time.time() - began))
    print(f"{out} is complete", flush=True)
    lines = read_jsonl(out / "gold.jsonl")
    if seconds.exists():
        lines[-1]["seconds"] = json.loads(seconds.read_text())
    return lines

def made_by_this_code(out):
    sources = json.loads((out / "run.json").read_text())["sources"]
    return all((HOME / name).exists() and code_of(HOME / name) == code for name, code in sources.items())

def offline_dpo(out, seed):
    """Train the base policy by one DPO on its own answers to the prompts of all three subsets. This runs the
    scripts one by one, without mt.py."""
    s, base = toy.SETTINGS, toy.build(seed)
    o = Options(**(s | base | dict(rounds=1, seed=seed, out=str(out))))
    claim(out, o)
    prompts = [{"prompt": p} for p in toy.parts(seed)["loop"]]
    write_jsonl(out / "prompts.jsonl", prompts[s["select_prompts"]:])
    command("sampler.py", "--model", base["policy"], "--prompts", out / "prompts.jsonl",
            "--out", out / "samples.jsonl", "--max_new_tokens", s["max_new_tokens"],
            "--sample_batch", s["sample_batch"], "--seed", seed)
    command("reward.py", "--model", base["rm"], "--samples", out / "samples.jsonl",
            "--out", out / "scored.jsonl", "--micro_batch", s["score_batch"])
    command("filter.py", "--samples", out / "scored.jsonl", "--out", out / "pairs.jsonl")
    command("dpo.py", "--model", base["policy"], "--pairs", out / "pairs.jsonl",
            "--out", out / "round1/e1/policy", "--beta", s["beta"], "--lr", s["policy_lr"],
            "--batch", s["policy_batch"], "--micro_batch", s["micro_batch"],
            "--max_length", s["max_length"], "--seed", seed)
    gold.measure(o)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 9))
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    parser.add_argument("--json", help="JSONL file for the lines of all runs")
    o = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(toy.build, o.seeds))
        jobs = {(arm, seed): pool.submit(run, arm, seed) for seed in o.seeds for arm in o.arms}
    runs = {arm: [jobs[arm, seed].result() for seed in o.seeds] for arm in o.arms}
    table(runs)
    if o.json:
        write_jsonl(o.json, [{"arm": arm, "seed": seed, **line} for arm, lines in runs.items()
                             for seed, lines in zip(o.seeds, lines) for line in lines])

def table(runs):
    """Print a row for each arm of {arm: [the lines of gold.jsonl of one seed]}: gold after each round, how
    far it is above the arms in COMPARED_WITH with the same seed, and LAST_ROUND's fields. Others are compared
    with the last line of an arm that has fewer rounds, as offline DPO has."""
    rounds = range(1, ROUNDS + 1)
    others = [(arm, n) for arm, numbers in COMPARED_WITH.items() if arm in runs for n in numbers]
    print(f"base: {mean_and_error([line[0]['gold'] for line in next(iter(runs.values()))])}\n")
    heads = [f"round {n}" for n in rounds] + [f"above {other}, {n}" for other, n in others]
    print(f"| arm | {' | '.join(heads + [*LAST_ROUND])} |\n|---{'|---' * len(heads + [*LAST_ROUND])}|")
    for arm, lines in runs.items():
        cells = [[line[n]["gold"] for line in lines if n < len(line)] for n in rounds]
        cells += [[line[n]["gold"] - beside[min(n, len(beside) - 1)]["gold"]
                   for line, beside in zip(lines, runs[other]) if n < len(line) and arm != other]
                  for other, n in others]
        cells += [[line[-1][key] for line in lines if line[-1].get(key) is not None]
                  for key in LAST_ROUND.values()]
        print(f"| {arm} | {' | '.join(map(mean_and_error, cells))} |")

def mean_and_error(values):
    if not len(values):
        return ""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    digits = 0 if np.mean(values) > 99 else 2
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"

if __name__ == "__main__":
    main()

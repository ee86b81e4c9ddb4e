"""The embedded task, arm by arm and seed by seed: the table in docs/results.md.

    python bench/arms.py --seeds 1 2 3 4

Runs mt.py as it stands, two runs at a time with a thread each, into runs/arms/; runs that are there are not
done again. An arm that has stopped keeps its last policy for the rounds that follow.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
import toy  # noqa: E402
from data import read_jsonl, write_jsonl  # noqa: E402
from evals import gold  # noqa: E402
from manifest import claim  # noqa: E402
from mt import Options  # noqa: E402

ROUNDS = 3
ARMS = {
    "full": [],
    "fixed RM": ["--update_rm", "false"],
    "fixed RM, no selection, no stop": ["--update_rm", "false", "--select", "false"],
    "no selection": ["--select", "false"],
    "no filter": ["--filter", "false"],
    "offline DPO": None,
}


def command(script, *words):
    done = subprocess.run([sys.executable, str(HOME / script), *map(str, words)], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)


def run(arm, seed):
    """gold.jsonl's lines of an arm."""
    out = Path("runs") / "arms" / f"{arm.replace(',', '').replace(' ', '-')}-seed{seed}"
    if not (out / "gold.jsonl").exists():
        if ARMS[arm] is None:
            offline(out, seed)
        else:
            command("mt.py", "--rounds", ROUNDS, "--seed", seed, "--out", out, *ARMS[arm])
    print(f"{out} is there", flush=True)
    return read_jsonl(out / "gold.jsonl")


def offline(out, seed):
    """One DPO on the base policy's answers to the prompts of all three subsets, by the scripts alone."""
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    o = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(toy.build, o.seeds))
        jobs = {(arm, seed): pool.submit(run, arm, seed) for seed in o.seeds for arm in o.arms}
    print("| arm | round | gold | win rate against base | tokens "
          "| RM accuracy, base's answers | own answers |")
    print("|---|---|---|---|---|---|---|")
    for arm in o.arms:
        lines = [jobs[arm, seed].result() for seed in o.seeds]
        for number in range(arm != o.arms[0], len(lines[0])):  # the base once
            print(f"| {arm if number else ''} | {lines[0][number]['policy']} |" + "".join(
                f" {mean_and_error([run[number][key] for run in lines])} |"
                for key in ("gold", "win_rate", "tokens", "accuracy_base", "accuracy_current")))


def mean_and_error(values):
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.2f} ± {error:.2f}"


if __name__ == "__main__":
    main()

"""Measure models and look at runs. `python eval.py COMMAND --help` explains a command.

    python eval.py winrate --policy runs/mt/policy --baseline MODEL --rm RM --prompts prompts.jsonl
    python eval.py accuracy --rm RM --pairs pairs.jsonl
    python eval.py rewardbench --rm runs/mt/rm --data filtered.parquet --json rewardbench.json
    python eval.py rewardbench2 --rm runs/mt/rm --data test.parquet --json rewardbench2.json
    python eval.py alpaca-generate --policy runs/mt/policy --prompts alpaca_eval.json
    python eval.py alpaca --annotations annotations.json --gamed df_gamed.csv
    python eval.py arena-generate --policy runs/mt/policy --prompts question.jsonl
    python eval.py arena --judgments MODEL.jsonl
    python eval.py agreement --run runs/mt             # by an outside judge: --write and --verdicts
    python eval.py report runs/mt                      # or several: RUN RUN --out page.html
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.data import read_jsonl, read_pairs, read_prompts
from common.models import check_policy, check_reward, local_folder, prompts_that_fit
from common.parallel import Problem, rank, say
from common.run import claim, exists, launch, option, parse
from evals import figures
from evals.agreement import Agreement, agreement
from evals.alpaca import Alpaca, AlpacaGenerate, alpaca, alpaca_generate
from evals.arena import Arena, ArenaGenerate, arena, arena_generate
from evals.plots import can_plot, draw_picture
from evals.report import SHOWN, write_page
from evals.rewardbench import RewardBench, judge_pairs, rewardbench
from evals.rewardbench2 import RewardBench2, rewardbench2
from evals.stats import JSON, means, publish, shares, standard_error
from filter import wins
from reward import sample_and_score

@dataclass
class WinRate:
    policy: str = option(help="folder or hub id")
    baseline: str = option(help="folder or hub id")
    rm: str = option(help="the judge: folder or hub id")
    prompts: str = option(help="JSONL, JSON, parquet or hub id with a field `prompt`")
    out: str = option("runs/winrate", "folder for the scored responses")
    json: str = option("", JSON)
    temperature: float = option(0.8)
    top_p: float = option(0.95)
    max_new_tokens: int = option(1024)
    seed: int = option(0)
    sample_batch: int = option(64)
    score_batch: int = option(8)

def winrate(o):
    judge, out, prompts = local_folder(o.rm), Path(o.out), read_prompts(o.prompts)[0]
    sides = {"policy": local_folder(o.policy), "baseline": local_folder(o.baseline)}
    check_reward(judge)
    prompts, _ = prompts_that_fit(judge, prompts, o.max_new_tokens)
    for policy in sides.values():
        check_policy(policy)
        prompts, _ = prompts_that_fit(policy, prompts)
    claim(out, replace(o, json=""))
    rows = {}
    for side, folder in sides.items():
        path = out / f"{side}.jsonl"
        if not exists(path):
            sample_and_score(o, folder, judge, prompts, 1, f"{o.seed}/{side}", path)
        rows[side] = [row | {"reward": row["score"], "characters": len(row["response"])}
                      for row in read_jsonl(path)]
    # Two policies may have different tokenizers, so their lengths are compared in characters.
    column = {name: [np.array([row[name] for row in some]) for some in rows.values()]
              for name in ("reward", "characters")}
    won = wins(*column["reward"])
    say(f"{len(prompts)} prompts, win rate {won.mean():.4f}")
    found = shares(won, "win_rate", *column["characters"])
    for (side, some), rewards in zip(rows.items(), column["reward"]):
        found[side] = means(some, "reward", "tokens", "characters", "finished")
        say(f"{side:9} reward {rewards.mean():8.4f} ± {standard_error(rewards):.4f}")
    publish(found, o.json)

@dataclass
class Accuracy:
    rm: str = option(help="folder or hub id")
    pairs: str = option(help="preference pairs with prompt, chosen, rejected and, optionally, subset")
    json: str = option("", JSON)
    score_batch: int = option(8)
    max_length: int = option(10**6, "leave out pairs with more tokens, or beyond the RM's context")

def pair_accuracy(o):
    pairs, right = judge_pairs(local_folder(o.rm), read_pairs(o.pairs), o.score_batch, o.max_length)
    say(f"accuracy {right.mean():.4f} on {len(pairs)} pairs")
    characters = [np.array([len(pair[side]) for pair in pairs]) for side in ("chosen", "rejected")]
    subsets = [str(pair.get("subset") or "-") for pair in pairs]
    publish(shares(right, "accuracy", *characters, subsets if {*subsets} != {"-"} else ()), o.json)

@dataclass
class Report:
    runs: list[str] = option(help="run folders")
    out: str = option("", "the page, or its folder (default: the folder of the first run)")

def report(*folders, out=""):
    """Print the tables of each run, draw its report.png, and write one report.html with all runs."""
    if rank() > 0:
        return
    runs = [figures.load(folder, SHOWN) for folder in folders]
    for run in runs:
        say(figures.tables(run))
        say(f"picture: {draw_picture(run)}" if can_plot() else "no picture: pip install matplotlib")
    path = Path(out) if out.endswith(".html") else Path(out or folders[0]) / "report.html"
    write_page(runs, path)
    say(f"page: {path}")

COMMANDS = {"winrate": (WinRate, winrate), "accuracy": (Accuracy, pair_accuracy),
            "rewardbench": (RewardBench, rewardbench), "rewardbench2": (RewardBench2, rewardbench2),
            "alpaca": (Alpaca, alpaca), "alpaca-generate": (AlpacaGenerate, alpaca_generate),
            "arena": (Arena, arena), "arena-generate": (ArenaGenerate, arena_generate),
            "agreement": (Agreement, agreement), "report": (Report, lambda o: report(*o.runs, out=o.out))}

def main():
    command, words = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if command in ("-h", "--help"):
        return say(__doc__)
    if command not in COMMANDS:
        raise Problem(f"name a command: {', '.join(COMMANDS)}")
    if command == "report" and words and not words[0].startswith("-"):
        words = ["--runs", *words]
    options, work = COMMANDS[command]
    work(parse(options, words))

if __name__ == "__main__":
    launch(main)

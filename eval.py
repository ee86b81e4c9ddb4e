"""Look at models and runs.

    python eval.py winrate --policy runs/mt/policy --baseline MODEL --rm RM --prompts prompts.jsonl
    python eval.py accuracy --rm RM --pairs pairs.jsonl
    python eval.py rewardbench --rm runs/mt/rm --data filtered.parquet --json rewardbench.json
    python eval.py alpaca-generate --policy runs/mt/policy --prompts alpaca_eval.json
    python eval.py alpaca --annotations annotations.json --gamed df_gamed.csv
    python eval.py arena-generate --policy runs/mt/policy --prompts question.jsonl
    python eval.py arena --judgments MODEL.jsonl
    python eval.py agreement --run runs/mt
    python eval.py report runs/mt                      # or several: RUN RUN --out page.html

winrate: a response of each policy to every prompt, judged by a reward model. accuracy: of a reward model on
labelled pairs; both also where the two answers are of similar length. rewardbench: a reward model on the file
of RewardBench. alpaca-generate, arena-generate: a policy's answers as AlpacaEval's model_outputs.json and as
Arena-Hard v0.1's answer file, for a judge that is not ours; alpaca, arena: the scores from what it said.
agreement: how often a run's reward models agree with gold, or with each other, on answers of its policies.
report: the table of a run, its picture (report.png) and its page (report.html), see evals/report.py. All
but the first two stand in evals/. `import eval` hides a builtin: write `from eval import …`.
"""
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import reward
from data import Problem, read_pairs, read_prompts
from evals.agreement import Agreement, agreement
from evals.alpaca import Alpaca, AlpacaGenerate, alpaca, alpaca_generate
from evals.arena import Arena, ArenaGenerate, arena, arena_generate
from evals.report import Report, report
from evals.rewardbench import RewardBench, rewardbench
from evals.stats import JSON, publish, shares, standard_error
from filter import wins
from manifest import claim
from models import check_policy, check_reward, encode_prompts, local_folder
from parallel import say
from rollout import sample_and_score
from run import launch, parse


@dataclass
class WinRate:
    policy: str = field(metadata={"help": "folder or hub id"})
    baseline: str = field(metadata={"help": "folder or hub id"})
    rm: str = field(metadata={"help": "the judge: folder or hub id"})
    prompts: str = field(metadata={"help": "JSONL, JSON, parquet or hub id with a field `prompt`"})
    prompt_field: str = field(default="", metadata={
        "help": "where in a row the prompt stands, if not under a usual name"})
    out: str = field(default="runs/winrate", metadata={"help": "folder for the scored responses"})
    json: str = field(**JSON)
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 1024
    seed: int = 0
    sample_batch: int = 64
    score_batch: int = 8


def winrate(o):
    prompts, _ = read_prompts(o.prompts, o.prompt_field)
    judge, out = local_folder(o.rm), Path(o.out)
    check_reward(judge)
    encode_prompts(judge, prompts, o.max_new_tokens)  # what a model can't read is said before sampling
    sides = {"policy": local_folder(o.policy), "baseline": local_folder(o.baseline)}
    for policy in sides.values():
        check_policy(policy)
        encode_prompts(policy, prompts)
    claim(out, replace(o, json=""))
    scored = {side: sample_and_score(o, policy, judge, prompts, 1, f"{o.seed}/{side}", out / f"{side}.jsonl")
              for side, policy in sides.items()}
    policy, baseline = (columns(rows) for rows in scored.values())
    won = wins(policy["reward"], baseline["reward"])
    say(f"{len(prompts)} prompts, win rate {won.mean():.4f}")
    figures = shares(won, "win_rate", policy["characters"], baseline["characters"])
    for side, values in (("policy", policy), ("baseline", baseline)):
        say(f"{side:9} reward {values['reward'].mean():8.4f} ± {standard_error(values['reward']):.4f}")
        figures[side] = {name: float(value.mean()) for name, value in values.items()}
    publish(figures, o.json)


def columns(rows):
    """Scored responses -> (N,) each; tokens are the policy's own, so only characters compare two policies."""
    return {"reward": np.array([row["score"] for row in rows]),
            "tokens": np.array([row["tokens"] for row in rows]),
            "characters": np.array([len(row["response"]) for row in rows]),
            "finished": np.array([row["finished"] for row in rows])}


@dataclass
class Accuracy:
    rm: str = field(metadata={"help": "folder or hub id"})
    pairs: str = field(metadata={"help": "preference pairs: prompt, chosen, rejected, perhaps subset"})
    json: str = field(**JSON)
    score_batch: int = 8
    max_length: int = field(default=10**6, metadata={
        "help": "tokens of prompt and answer; pairs that are longer, or than the RM's context, are left out"})


def pair_accuracy(o):
    folder = local_folder(o.rm)
    pairs = reward.readable(folder, read_pairs(o.pairs), o.max_length)
    right = reward.ordered(folder, pairs, o.score_batch)
    say(f"accuracy {np.mean(right):.4f} on {len(pairs)} pairs")
    characters = [np.array([len(pair[side]) for pair in pairs]) for side in ("chosen", "rejected")]
    subsets = [pair.get("subset") or "-" for pair in pairs] if any("subset" in pair for pair in pairs) else ()
    publish(shares(right, "accuracy", *characters, subsets), o.json)


COMMANDS = {"winrate": (WinRate, winrate), "accuracy": (Accuracy, pair_accuracy),
            "rewardbench": (RewardBench, rewardbench), "alpaca": (Alpaca, alpaca), "arena": (Arena, arena),
            "alpaca-generate": (AlpacaGenerate, alpaca_generate),
            "arena-generate": (ArenaGenerate, arena_generate),
            "report": (Report, lambda o: report(*o.runs, out=o.out)),
            "agreement": (Agreement, agreement)}


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

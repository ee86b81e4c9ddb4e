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
report: the table of a run, its picture (report.png) and its page (report.html), see evals/report.py. How
each figure is defined stands in benchmarks.py. `import eval` hides a builtin: write `from eval import …`.
"""
import csv
import json
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import combinations, groupby, islice
from pathlib import Path

import numpy as np

import benchmarks
import reward
from benchmarks import standard_error
from data import (
    Problem,
    check_prompt,
    load_tokenizer,
    prompt_id,
    read_jsonl,
    read_pairs,
    read_prompts,
    read_rows,
    seed_of,
    write_jsonl,
)
from evals import figures
from evals.report import report
from filter import wins
from models import load_reward, local_folder
from parallel import rank, replicate, say
from rollout import sample_and_score
from run import claim, exists, launch, parse, write_json
from sampler import sample

JSON = dict(default="", metadata={"help": "also write the figures to this file"})
PUBLISHED = {
    "annotations": "github.com/tatsu-lab/alpaca_eval: results/MODEL/JUDGE/annotations.json",
    "gamed": "huggingface.co/datasets/tatsu-lab/alpaca_eval: df_gamed.csv",
    "instructions": "huggingface.co/datasets/tatsu-lab/alpaca_eval: alpaca_eval.json",
    "rewardbench": "huggingface.co/datasets/allenai/reward-bench: the split `filtered`",
    "questions": "github.com/lmarena/arena-hard-auto: data/arena-hard-v0.1/question.jsonl",
    "judgments": "huggingface.co/spaces/lmarena-ai/arena-hard-browser: data/arena-hard-v0.1/model_judgment",
}


def need(path, what):
    if not Path(path).exists():
        raise Problem(f"{path}: no such file; it is published at {PUBLISHED[what]}")
    return path


def publish(figures, path):
    """Print {name: figure, or a dict of figures} as a table; write it to the JSON file `path`, if given."""
    show(figures)
    if path:
        write_json(path, json.loads(json.dumps(figures), parse_constant=lambda _: None))  # JSON has no NaN


def show(figures, indent=""):
    for name, value in figures.items():
        if not isinstance(value, dict):
            say(f"{indent}{name:26}{value:.6g}")
        elif any(isinstance(inner, dict) for inner in value.values()):
            say(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            say(f"{indent}{name:26}" + "  ".join(f"{key} {x:.6g}" for key, x in value.items()))


# ---------------------------------------------------------------- winrate
@dataclass
class WinRate:
    policy: str = field(metadata={"help": "folder or hub id"})
    baseline: str = field(metadata={"help": "folder or hub id"})
    rm: str = field(metadata={"help": "the judge: folder or hub id"})
    prompts: str = field(metadata={"help": "JSONL, JSON, parquet or hub id with a field `prompt`"})
    out: str = field(default="runs/winrate", metadata={"help": "folder for the scored responses"})
    json: str = field(**JSON)
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 1024
    seed: int = 0
    sample_batch: int = 64
    score_batch: int = 8


def winrate(o):
    prompts, _ = read_prompts(o.prompts)
    judge, out = local_folder(o.rm), Path(o.out)
    claim(out, replace(o, json=""))
    scored = {side: sample_and_score(o, local_folder(policy), judge, prompts, 1, f"{o.seed}/{side}",
                                     out / f"{side}.jsonl")
              for side, policy in (("policy", o.policy), ("baseline", o.baseline))}
    policy, baseline = (columns(rows) for rows in scored.values())
    won = wins(policy["reward"], baseline["reward"])
    say(f"{len(prompts)} prompts, win rate {won.mean():.4f}")
    figures = benchmarks.shares(won, "win_rate", policy["characters"], baseline["characters"])
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


# ---------------------------------------------------------------- accuracy, RewardBench
@dataclass
class Accuracy:
    rm: str = field(metadata={"help": "folder or hub id"})
    pairs: str = field(metadata={"help": "preference pairs: prompt, chosen, rejected, perhaps subset"})
    json: str = field(**JSON)
    score_batch: int = 8


def accuracy(o):
    pairs = read_pairs(o.pairs)
    right = reward.ordered(local_folder(o.rm), pairs, o.score_batch)
    say(f"accuracy {np.mean(right):.4f} on {len(pairs)} pairs")
    characters = [np.array([len(pair[side]) for pair in pairs]) for side in ("chosen", "rejected")]
    subsets = [pair.get("subset", "-") for pair in pairs] if any("subset" in pair for pair in pairs) else ()
    publish(benchmarks.shares(right, "accuracy", *characters, subsets), o.json)


@dataclass
class RewardBench:
    rm: str = field(metadata={"help": "folder or hub id"})
    data: str = field(metadata={"help": "RewardBench v1: prompt, chosen, rejected, subset"})
    prior: float | None = field(default=None, metadata={
        "help": "percent on the prior test sets, for the published score with them"})
    old_xstest: bool = field(default=False, metadata={
        "help": "the two xstest weights exchanged, as in tables of before September 2024"})
    json: str = field(**JSON)
    score_batch: int = 8


def rewardbench(o):
    pairs = read_pairs(need(o.data, "rewardbench"))
    unknown = {str(pair.get("subset")) for pair in pairs} - set(benchmarks.SUBSETS)
    if unknown:
        raise Problem(f"{o.data}: not a subset of RewardBench v1: {', '.join(sorted(unknown)[:3])} "
                      "(other pairs: eval.py accuracy)")
    right = np.array(reward.ordered(local_folder(o.rm), pairs, o.score_batch))
    subsets = np.array([pair["subset"] for pair in pairs])
    accuracies = {s: 100 * float(right[subsets == s].mean()) for s in benchmarks.SUBSETS if s in subsets}
    missing = [s for s in benchmarks.SUBSETS if s not in accuracies]
    say(f"{len(pairs)} pairs; without {', '.join(missing)}" if missing else f"{len(pairs)} pairs")
    publish(accuracies | benchmarks.rewardbench(accuracies, o.old_xstest, o.prior), o.json)


# ---------------------------------------------------------------- AlpacaEval 2
@dataclass
class AlpacaGenerate:
    policy: str = field(metadata={"help": "folder or hub id"})
    prompts: str = field(metadata={"help": "JSON or JSONL with a field `instruction` or `prompt`"})
    out: str = field(default="runs/alpaca", metadata={"help": "folder for model_outputs.json"})
    name: str = field(default="", metadata={"help": "the generator's; default: the policy's last folder"})
    temperature: float = field(default=0.0, metadata={"help": "0: greedy"})
    top_p: float = 0.95
    max_new_tokens: int = 2048
    seed: int = 0
    sample_batch: int = 64


def alpaca_generate(o):
    rows = read_rows(need(o.prompts, "instructions"))
    prompts = [check_prompt(where, row.get("instruction", row.get("prompt"))) for where, row in rows]
    name, answers = answer(o, prompts)
    write_json(Path(o.out) / "model_outputs.json", [
        dict(instruction=prompt, output=reply["response"], generator=name, dataset=row.get("dataset", ""))
        for prompt, reply, (_, row) in zip(prompts, answers, rows)])
    say(f"{Path(o.out) / 'model_outputs.json'}: {len(rows)} answers")


def answer(o, prompts):
    """(generator's name, a row of sampler.py for every prompt, in their order)."""
    path = Path(o.out) / "samples.jsonl"
    claim(o.out, o)
    if not exists(path):
        sample(local_folder(o.policy), prompts, path, samples=1, temperature=o.temperature, top_p=o.top_p,
               max_new_tokens=o.max_new_tokens, batch=o.sample_batch, seed=o.seed)
    return o.name or Path(o.policy).name, read_jsonl(path)


@dataclass
class Alpaca:
    annotations: str = field(metadata={"help": "annotations.json of one model, or its columns as one object"})
    gamed: str = field(metadata={"help": "df_gamed.csv: difficulty of instructions, the gamed baselines"})
    json: str = field(**JSON)


def alpaca(o):
    model, baseline, raw, lengths, baseline_lengths = read_annotations(need(o.annotations, "annotations"))
    difficulty, gamed = read_gamed(need(o.gamed, "gamed"))
    if len(raw) > len(difficulty):
        raise Problem(f"{o.annotations}: {len(raw)} rows, but {o.gamed} knows {len(difficulty)} instructions")
    say(f"{model} against {baseline}")
    # by the row's position, as the official tool has it, even where an instruction is missing
    publish(benchmarks.alpaca(benchmarks.preferences(raw), lengths, baseline_lengths, difficulty[:len(raw)],
                              gamed, model == baseline), o.json)


def read_annotations(path):
    """(model, baseline, raw preferences (N,), lengths of the model's outputs in characters (N,), the
    baseline's) of AlpacaEval's annotations.json, or of the same in columns."""
    rows = [row for _, row in read_rows(path)]
    try:
        if isinstance(rows[0]["preference"], list):
            names = [(rows[0]["model"], rows[0]["baseline"])]
            columns = [rows[0][key] for key in ("preference", "len_output", "len_baseline")]
        else:
            names = [(row["generator_2"], row["generator_1"]) for row in rows]
            columns = zip(*((row["preference"], len(row["output_2"]), len(row["output_1"])) for row in rows))
        raw, *lengths = (np.array(column, float) for column in columns)
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(f"{path}: not AlpacaEval's annotations ({error!r})") from None
    if len(set(names)) > 1 or len({len(column) for column in (raw, *lengths)}) > 1:
        raise Problem(f"{path}: several models, or columns of different lengths; one model's rows are needed")
    if np.isnan(raw).all() or not (np.isnan(raw) | (raw == 0) | (raw >= 1) & (raw <= 2)).all():
        raise Problem(f"{path}: preferences are from 1 to 2, 0 for a draw, null for none (not all of them)")
    return *names[0], raw, *lengths


def read_gamed(path):
    """df_gamed.csv -> difficulty γ by position (805,), and (G, 3): tanh of the length, γ, preference."""
    names = ("index", "std_delta_len", "instruction_difficulty", "preference")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = np.array([[float(row[name] or "nan") for name in names] for row in csv.DictReader(file)])
        if np.isnan(table[:, :3]).any():
            raise ValueError("a number is missing")
        index, length, difficulty, preference = table.T
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise Problem(f"{path}: not AlpacaEval's df_gamed.csv ({error!r})") from None
    first = np.unique(index, return_index=True)[1]
    gamed = np.stack([np.tanh(length), difficulty, preference], axis=1)
    return difficulty[first], gamed[~np.isnan(preference)]


# ---------------------------------------------------------------- Arena-Hard
@dataclass
class ArenaGenerate(AlpacaGenerate):
    prompts: str = field(metadata={"help": "Arena-Hard v0.1's question.jsonl"})
    out: str = field(default="runs/arena", metadata={"help": "folder for NAME.jsonl, the answers"})
    max_new_tokens: int = 4096


def arena_generate(o):
    rows = read_rows(need(o.prompts, "questions"))
    try:
        ids = [row["question_id"] for _, row in rows]
        prompts = [check_prompt(where, row["turns"][0]["content"]) for where, row in rows]
    except (KeyError, TypeError, IndexError) as error:
        raise Problem(f"{o.prompts}: not Arena-Hard v0.1's questions ({error!r})") from None
    name, answers = answer(o, prompts)
    path = Path(o.out) / f"{name}.jsonl"
    if rank() == 0:
        write_jsonl(path, [
            dict(question_id=id, answer_id=f"{seed_of(name, id):016x}", model_id=name, tstamp=time.time(),
                 choices=[dict(index=0, turns=[dict(content=reply["response"], token_len=reply["tokens"])])])
            for id, reply in zip(ids, answers)])
    say(f"{path}: {len(answers)} answers")


@dataclass
class Arena:
    judgments: str = field(metadata={"help": "JSONL of one model: two `games` per question, with `score`"})
    json: str = field(**JSON)


def arena(o):
    rows = read_rows(need(o.judgments, "judgments"))
    try:
        verdicts = [[game and game["score"] for game in row["games"]] for _, row in rows]
        models = {row["model"] for _, row in rows}
    except (KeyError, TypeError) as error:
        raise Problem(f"{o.judgments}: not Arena-Hard's judgments ({error!r})") from None
    if len(models) > 1 or {len(pair) for pair in verdicts} != {2}:
        raise Problem(f"{o.judgments}: two games per question are needed, and all of one model")
    if not any(verdict in benchmarks.GAMES for pair in verdicts for verdict in pair):
        raise Problem(f"{o.judgments}: no verdict (as score: {', '.join(benchmarks.GAMES)})")
    say(f"{models.pop()} against the baseline")
    publish(benchmarks.arena(verdicts), o.json)


# ---------------------------------------------------------------- report
@dataclass
class Report:
    runs: list[str] = field(metadata={"help": "run folders"})
    out: str = field(default="", metadata={"help": "the page, or the folder for it; none: the first run's"})


# ---------------------------------------------------------------- agreement
@dataclass
class Agreement:
    run: str = field(metadata={"help": "run folder"})
    prompts: int = field(default=200, metadata={"help": "without gold: the first prompts of each E-step"})
    score_batch: int = 8
    json: str = field(**JSON)


def agreement(o):
    """Print how often each RM orders two answers of a PM as gold does (without gold: as the run's last
    RM does), and how often PM and RM disagree."""
    run, judged = figures.load(o.run), {}
    answers, rms = answers_of(run, o.prompts), rms_of(run)
    for rm, folder in rms.items():
        model, tokenizer = reward.Rewards(replicate(load_reward(folder))), load_tokenizer(folder)
        judged[rm] = {pm: reward.score_answers(model, tokenizer, [
            (group[0]["prompt"], [row["response"] for row in group]) for group in groups], o.score_batch)
            for pm, groups in answers.items()}
    judge = {pm: [[row["gold"] for row in group] for group in groups] for pm, groups in answers.items()} \
        if run["gold"] else judged[list(rms)[-1]]
    shares = {pm: {rm: ordered_alike(judged[rm][pm], judge[pm]) for rm in rms} for pm in answers}
    say(f"agreement with {'gold' if run['gold'] else list(rms)[-1]}\n{'answers of':12}"
        + "".join(f"{rm:>8}" for rm in rms))
    for pm, row in shares.items():
        say(f"{pm:12}" + "".join(f"{share:8.3f}" for share in row.values()))
    say("PM-RM disagreement")
    for phase, share in disagreement(run).items():
        say(f"{phase:12}{share:8.3f}")
    if o.json:
        write_json(o.json, dict(agreement=shares, disagreement=disagreement(run)))


def disagreement(run):
    """{E-step: share of DPO pairs in the epoch's second half that β log π/π_{t−1} orders against the RM}."""
    return {phase: float(1 - np.mean([row["rewards/accuracies"] for row in rows[len(rows) // 2:]]))
            for phase, rows in figures.training(run, "E")}


def rms_of(run):
    """{name: folder} of the run's RMs, the base first."""
    made = [run["folder"] / s["phase"] / "rm" for s in figures.m_steps(run)]
    base = run["settings"].get("rm")
    if not base:
        raise Problem(f"{run['folder']}: run.json does not name the base reward model")
    return {f"RM {i}": local_folder(str(folder)) for i, folder in enumerate([base, *made])}


def answers_of(run, prompts):
    """{PM: [a prompt's rows]}: with gold the answers to test prompts after each round, with a field `gold`;
    else those of the E-steps to their first prompts."""
    if run["gold"]:
        import toy  # whose judge this is; it imports this module
        files = {g["policy"]: run["folder"] / "test" / g["policy"].replace(" ", "") / "r0.jsonl"
                 for g in run["gold"]}
        rows = {pm: [row | {"gold": toy.gold_of(row)} for row in figures.stream(file)]
                for pm, file in files.items() if file.exists()}  # rounds after a stop have none
    else:
        rows = {f"PM {s['pm']}": figures.stream(run["folder"] / s["phase"] / "samples.jsonl")
                for s in figures.e_steps(run)}
    return {pm: [list(group) for _, group in islice(groupby(some, key=lambda row: prompt_id(row["prompt"])),
                                                    None if run["gold"] else prompts)]
            for pm, some in rows.items()}


def ordered_alike(scores, truth):
    """Share of the pairs of answers to a prompt that `scores` orders as `truth` does, where that has a
    preference; equal scores are wrong. Both are a list of rewards per prompt."""
    pairs = [(a[i] - a[j], b[i] - b[j]) for a, b in zip(scores, truth)
             for i, j in combinations(range(len(a)), 2)]
    return float(np.mean([x * y > 0 for x, y in pairs if y]))


COMMANDS = {"winrate": (WinRate, winrate), "accuracy": (Accuracy, accuracy),
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

"""AlpacaEval 2: a policy's answers for a judge that is not ours, and the figures from what it said.

    python eval.py alpaca-generate --policy runs/mt/policy --prompts alpaca_eval.json
    python eval.py alpaca --annotations annotations.json --gamed df_gamed.csv

alpaca-generate writes model_outputs.json, as the official tool reads it; alpaca takes that tool's annotations
and gives its win rates, also those at equal lengths, in percent.

Left out on purpose: asking a judge (it needs a network and a key), the cross-validated L1 penalty of the
official fit (it moves the result by about 0.1; the most seen is 0.14).
"""
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data import check_prompt, read_jsonl, read_rows
from common.models import local_folder
from common.parallel import Problem, say
from common.run import claim, exists, option, write_json
from evals.stats import JSON, bootstrap, need, publish, standard_error
from sampler import sample

# where the files are published
ANNOTATIONS = "github.com/tatsu-lab/alpaca_eval: results/MODEL/JUDGE/annotations.json"
GAMED = "huggingface.co/datasets/tatsu-lab/alpaca_eval: df_gamed.csv"
INSTRUCTIONS = "huggingface.co/datasets/tatsu-lab/alpaca_eval: alpaca_eval.json"

# ---------------------------------------------------------------- figures, from numpy arrays
def preferences(raw):
    """Raw preferences (N,): 1 baseline … 2 model, 0 a draw, NaN none -> in [0, 1], where a draw is 1/2."""
    return np.where(raw == 0, 1.5, raw) - 1

def win_rates(y):
    """(N,) preferences in [0, 1] -> AlpacaEval's figures, in percent; NaN is left out."""
    y = y[~np.isnan(y)]
    wins, losses = int((y > 0.5).sum()), int((y < 0.5).sum())
    draws = len(y) - wins - losses
    return dict(win_rate=100 * float(y.mean()), standard_error=100 * standard_error(y), n_wins=wins,
                n_wins_base=losses, n_draws=draws, n_total=len(y),
                discrete_win_rate=100 * (wins + draws / 2) / len(y))

def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))

def cross_entropy(theta, x, y, weights):
    """Σ w (log(1 + e^z) − y z) with z = x·θ, for labels y in [0, 1]."""
    z = x @ theta
    return float(weights @ (np.logaddexp(0, z) - y * z))

def logistic(x, y, weights):
    """(N, K), (N,) in [0, 1], (N,) -> (K,): the minimum of cross_entropy, by Newton's method; a step that
    would raise the loss is halved. The ridge keeps separable data solvable and moves no minimum."""
    theta = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ theta)
        gradient = x.T @ (weights * (p - y))
        if np.abs(gradient).max() < 1e-9:
            break
        hessian = (x.T * (weights * p * (1 - p))) @ x + 1e-9 * np.eye(len(theta))
        step, before = np.linalg.solve(hessian, gradient), cross_entropy(theta, x, y, weights)
        while cross_entropy(theta - step, x, y, weights) > before and np.abs(step).max() > 1e-12:
            step /= 2
        theta = theta - step
    return theta

def length_controlled(y, shorter, difficulty, gamed):
    """The preference that each row would have at equal lengths (arXiv 2404.04475): logit p = θt + φγ + ψ,
    t = tanh(shorter / its standard deviation), predicted at t = 0.

    y (N,): preferences, NaN rows are only predicted. shorter (N,): characters by which the model's answer is
    shorter than the baseline's. difficulty (N,): γ of each row's position. gamed (G, 3): t, γ, y of the two
    gamed baselines, which enter with weight 0.1 and without ψ. Returns predictions (N,), (θ, φ, ψ).
    """
    deviation = shorter.std(ddof=1) if len(shorter) > 1 else 0.0
    t = np.tanh(shorter / deviation) if deviation > 0 else np.zeros(len(shorter))
    rows = np.stack([t, difficulty, np.ones(len(y))], axis=1)[~np.isnan(y)]
    x = np.concatenate([rows, gamed[:, :2] @ np.eye(2, 3)])
    weights = np.repeat([1.0, 0.1], [len(rows), len(gamed)])
    theta = logistic(x, np.concatenate([y[~np.isnan(y)], gamed[:, 2]]), weights)
    return sigmoid(theta[1] * difficulty + theta[2]), theta

def alpaca_figures(y, lengths, baseline_lengths, difficulty, gamed, is_baseline=False):
    """AlpacaEval 2's figures, under its names and in percent, with bootstrap intervals over the rows.

    y (N,): preferences; lengths of the outputs in characters; else as in length_controlled. The baseline
    against itself is 50 by definition.
    """
    def controlled(i):
        if is_baseline:
            return np.full(len(i), 0.5)
        return length_controlled(y[i], (baseline_lengths - lengths)[i], difficulty[i], gamed)[0]

    predicted, known = controlled(np.arange(len(y))), y[~np.isnan(y)]
    low, high = bootstrap(lambda i: 100 * known[i].mean(), len(known))
    lc_low, lc_high = bootstrap(lambda i: 100 * controlled(i).mean(), len(y))
    return win_rates(y) | dict(
        avg_length=int(np.mean(lengths)),  # cut off, not rounded, like the published ones
        length_controlled_winrate=100 * float(predicted.mean()),
        lc_standard_error=100 * standard_error(predicted),  # of the instructions' spread alone, as published
        win_rate_ci_low=low, win_rate_ci_high=high, lc_ci_low=lc_low, lc_ci_high=lc_high)

# ---------------------------------------------------------------- the official tool's files
def read_annotations(path):
    """(model, baseline, raw preferences (N,), lengths of the model's outputs in characters (N,), the
    baseline's) of AlpacaEval's annotations.json, or of the same in columns."""
    rows = [row for _, row in read_rows(path)]
    try:
        if isinstance(rows[0]["preference"], list):
            names = [(str(rows[0]["model"]), str(rows[0]["baseline"]))]
            columns = [rows[0][key] for key in ("preference", "len_output", "len_baseline")]
        else:
            names = [(str(row["generator_2"]), str(row["generator_1"])) for row in rows]
            columns = zip(*((row["preference"], len(row["output_2"]), len(row["output_1"])) for row in rows))
        raw, *lengths = (np.array(column, float) for column in columns)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
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
    except (KeyError, TypeError, ValueError, IndexError, csv.Error) as error:
        raise Problem(f"{path}: not AlpacaEval's df_gamed.csv ({error!r})") from None
    first = np.unique(index, return_index=True)[1]
    gamed = np.stack([np.tanh(length), difficulty, preference], axis=1)
    return difficulty[first], gamed[~np.isnan(preference)]

# ---------------------------------------------------------------- commands
@dataclass
class AlpacaGenerate:
    policy: str = option(help="folder or hub id")
    prompts: str = option(help="JSON or JSONL with a field `instruction` or `prompt`")
    out: str = option("runs/alpaca", "folder for model_outputs.json")
    name: str = option("", "the generator's; default: its folder, or its run")
    temperature: float = option(0.0, "0: greedy")
    top_p: float = 0.95
    max_new_tokens: int = 2048
    seed: int = 0
    sample_batch: int = 64

def alpaca_generate(o):
    rows = read_rows(need(o.prompts, INSTRUCTIONS))
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
               max_new_tokens=o.max_new_tokens, rows=o.sample_batch, seed=o.seed)
    return o.name or name_of(o.policy), read_jsonl(path)

def name_of(policy):
    """A policy's folder; in a run folder, where all are called `policy`, the run and the step."""
    *folders, name = Path(policy).absolute().parts
    if name != "policy":
        return name
    return "-".join(folders[-3:]) if folders[-2].startswith("round") else folders[-1]

@dataclass
class Alpaca:
    annotations: str = option(help="annotations.json of one model, or its columns as one object")
    gamed: str = option(help="df_gamed.csv: difficulty of instructions, the gamed baselines")
    json: str = option("", JSON)

def alpaca(o):
    model, baseline, raw, lengths, baseline_lengths = read_annotations(need(o.annotations, ANNOTATIONS))
    difficulty, gamed = read_gamed(need(o.gamed, GAMED))
    if len(raw) > len(difficulty):
        raise Problem(f"{o.annotations}: {len(raw)} rows, but {o.gamed} knows {len(difficulty)} instructions")
    say(f"{model} against {baseline}")
    # by the row's position, as the official tool has it, even where an instruction is missing
    publish(alpaca_figures(preferences(raw), lengths, baseline_lengths, difficulty[:len(raw)], gamed,
                           model == baseline), o.json)

"""AlpacaEval 2: write a policy's answers for an external judge, and compute the scores from its verdicts.

    python eval.py alpaca-generate --policy runs/mt/policy --prompts alpaca_eval.json
    python eval.py alpaca --annotations annotations.json --gamed df_gamed.csv

alpaca-generate writes model_outputs.json for the official tool, which asks the judge. alpaca reads the tool's
annotations and prints the win rate and the length-controlled win rate in percent.

Left out on purpose: asking a judge (it needs a network and a key), and the cross-validated L1 penalty of the
official fit, which moves the result by about 0.1 points, and by 0.14 at most where we compared.
"""
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data import check_prompt, read_jsonl, read_rows
from common.models import local_folder
from common.parallel import Problem, say
from common.run import claim, exists, option, write_json
from evals.stats import JSON, bootstrap, existing, publish, standard_error
from sampler import sample

# where the files are published
ANNOTATIONS = "github.com/tatsu-lab/alpaca_eval: results/MODEL/JUDGE/annotations.json"
GAMED = "huggingface.co/datasets/tatsu-lab/alpaca_eval: df_gamed.csv"
INSTRUCTIONS = "huggingface.co/datasets/tatsu-lab/alpaca_eval: alpaca_eval.json"

# ---------------------------------------------------------------- figures, from numpy arrays
def preferences(raw):
    """Map raw preferences (N,) to [0, 1]. They run from 1 for the baseline to 2 for the model; 0 is a draw
    and becomes 1/2. NaN is a missing preference and stays NaN."""
    return np.where(raw == 0, 1.5, raw) - 1

def win_rates(y):
    """Return AlpacaEval's win rates (percent) and counts from preferences (N,) in [0, 1]. NaN is left out."""
    y = y[~np.isnan(y)]
    wins, losses = int((y > 0.5).sum()), int((y < 0.5).sum())
    draws = len(y) - wins - losses
    return dict(win_rate=100 * float(y.mean()), standard_error=100 * standard_error(y), n_wins=wins,
                n_wins_base=losses, n_draws=draws, n_total=len(y),
                discrete_win_rate=100 * (wins + draws / 2) / len(y))

def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))

def cross_entropy(theta, x, y, weights):
    """Return Σ w (log(1 + e^z) − y z), where z = x·θ, for labels y in [0, 1]."""
    z = x @ theta
    return float(weights @ (np.logaddexp(0, z) - y * z))

def logistic(x, y, weights):
    """Return the θ (K,) with the least cross_entropy, for x (N, K), y (N,) in [0, 1] and weights (N,).

    The method is Newton's. A step that would raise the loss is halved. A ridge, in the Hessian alone, makes
    separable data solvable without moving the minimum.
    """
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
    """Predict the preference that each row would have if both answers were equally long (arXiv 2404.04475).

    The model is logit p = θt + φγ + ψ, with t = tanh(shorter / its standard deviation). The prediction is p
    at t = 0. Returns the predictions (N,) and (θ, φ, ψ).

    y (N,): preferences; where one is NaN, the row is predicted but not fitted. shorter (N,): by how many
    characters the model's answer is shorter than the baseline's. difficulty (N,): γ of the row's instruction.
    gamed (G, 3): t, γ and y of the two gamed baselines, which enter the fit with weight 0.1 and without ψ.
    """
    deviation = shorter.std(ddof=1) if len(shorter) > 1 else 0.0
    t = np.tanh(shorter / deviation) if deviation > 0 else np.zeros(len(shorter))
    rows = np.stack([t, difficulty, np.ones(len(y))], axis=1)[~np.isnan(y)]
    x = np.concatenate([rows, gamed[:, :2] @ np.eye(2, 3)])
    weights = np.repeat([1.0, 0.1], [len(rows), len(gamed)])
    theta = logistic(x, np.concatenate([y[~np.isnan(y)], gamed[:, 2]]), weights)
    return sigmoid(theta[1] * difficulty + theta[2]), theta

def alpaca_figures(y, lengths, baseline_lengths, difficulty, gamed, is_baseline=False):
    """Return AlpacaEval 2's figures in percent, under its names, with bootstrap intervals over the rows.

    y (N,): preferences. lengths, baseline_lengths (N,): of the outputs, in characters. difficulty, gamed: as
    in length_controlled. is_baseline: the model is the baseline, which is 50 against itself by definition.
    """
    def controlled(i):
        if is_baseline:
            return np.full(len(i), 0.5)
        return length_controlled(y[i], (baseline_lengths - lengths)[i], difficulty[i], gamed)[0]

    predicted, known = controlled(np.arange(len(y))), y[~np.isnan(y)]
    low, high = bootstrap(lambda i: 100 * known[i].mean(), len(known))
    lc_low, lc_high = bootstrap(lambda i: 100 * controlled(i).mean(), len(y))
    return win_rates(y) | dict(
        avg_length=int(np.mean(lengths)),  # truncated like the published ones, not rounded
        length_controlled_winrate=100 * float(predicted.mean()),
        lc_standard_error=100 * standard_error(predicted),  # as published, without the error of the fit
        win_rate_ci_low=low, win_rate_ci_high=high, lc_ci_low=lc_low, lc_ci_high=lc_high)

# ---------------------------------------------------------------- the official tool's files
def read_annotations(path):
    """Read AlpacaEval's annotations.json, or one object with the same in columns. Returns the names of model
    and baseline, raw preferences (N,), and lengths in characters (N,) of the model's outputs and of the
    baseline's."""
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
        raise Problem(f"{path}: several models, or columns of different lengths; give the rows of one model")
    if np.isnan(raw).all() or not (np.isnan(raw) | (raw == 0) | (raw >= 1) & (raw <= 2)).all():
        raise Problem(f"{path}: a preference is from 1 to 2, 0 for a draw or null, and not all may be null")
    return *names[0], raw, *lengths

def read_gamed(path):
    """Read df_gamed.csv. Returns the difficulty γ of each instruction (805,) and, for the rows that have a
    preference, (G, 3): tanh of the length difference, γ, preference."""
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
    name: str = option("", "name of the generator; none: the policy's folder, or its run")
    temperature: float = option(0.0, "0: greedy")
    top_p: float = 0.95
    max_new_tokens: int = 2048
    seed: int = 0
    sample_batch: int = 64

def alpaca_generate(o):
    rows = read_rows(existing(o.prompts, INSTRUCTIONS))
    prompts = [check_prompt(where, row.get("instruction", row.get("prompt"))) for where, row in rows]
    name, answers = answer(o, prompts)
    write_json(Path(o.out) / "model_outputs.json", [
        dict(instruction=prompt, output=reply["response"], generator=name, dataset=row.get("dataset", ""))
        for prompt, reply, (_, row) in zip(prompts, answers, rows)])
    say(f"{Path(o.out) / 'model_outputs.json'}: {len(rows)} answers")

def answer(o, prompts):
    """Sample an answer to every prompt, unless that is done already. Returns the generator's name and
    sampler.py's rows in the order of the prompts."""
    path = Path(o.out) / "samples.jsonl"
    claim(o.out, o)
    if not exists(path):
        sample(local_folder(o.policy), prompts, path, samples=1, temperature=o.temperature, top_p=o.top_p,
               max_new_tokens=o.max_new_tokens, rows=o.sample_batch, seed=o.seed)
    return o.name or name_of(o.policy), read_jsonl(path)

def name_of(policy):
    """Return the name of a policy's folder. In a run folder all policies are called `policy`, so return the
    run's name there, followed by the step if the policy is that of a step."""
    *folders, name = Path(policy).absolute().parts
    if name != "policy":
        return name
    return "-".join(folders[-3:]) if folders[-2].startswith("round") else folders[-1]

@dataclass
class Alpaca:
    annotations: str = option(help="annotations.json of one model, or one object with the same in columns")
    gamed: str = option(help="df_gamed.csv: the instructions' difficulty and the gamed baselines")
    json: str = option("", JSON)

def alpaca(o):
    model, baseline, raw, lengths, baseline_lengths = read_annotations(existing(o.annotations, ANNOTATIONS))
    difficulty, gamed = read_gamed(existing(o.gamed, GAMED))
    if len(raw) > len(difficulty):
        raise Problem(f"{o.annotations}: {len(raw)} rows, but {o.gamed} knows {len(difficulty)} instructions")
    say(f"{model} against {baseline}")
    # A row's difficulty goes by its position, as in the official tool, even where an instruction is missing.
    publish(alpaca_figures(preferences(raw), lengths, baseline_lengths, difficulty[:len(raw)], gamed,
                           model == baseline), o.json)

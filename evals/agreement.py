"""How often a run's reward models agree with gold, or with each other, on answers of its policies.

    python eval.py agreement --run runs/mt
"""
from dataclasses import dataclass
from itertools import islice

import numpy as np

import reward
from common.data import by_prompt
from common.models import local_folder
from common.parallel import Problem, say
from common.run import option, write_json
from common.toy import gold_of
from evals import figures
from evals.stats import JSON, ordered_alike

@dataclass
class Agreement:
    run: str = option(help="run folder")
    prompts: int = option(200, "without gold: the first prompts of each E-step")
    score_batch: int = 8
    json: str = option("", JSON)

def agreement(o):
    """Print how often each RM orders two answers of a PM as gold does (without gold: as the run's last
    RM does), and how often PM and RM disagree."""
    run, judged = figures.load(o.run), {}
    answers, rms = answers_of(run, o.prompts), rms_of(run)
    for rm, folder in rms.items():
        model, tokenizer = reward.load(folder)
        judged[rm] = {pm: reward.score_answers(model, tokenizer, [
            (group[0]["prompt"], [row["response"] for row in group]) for group in groups], o.score_batch)
            for pm, groups in answers.items()}
    judge = {pm: [[row["gold"] for row in group] for group in groups] for pm, groups in answers.items()} \
        if run["gold"] else judged[list(rms)[-1]]
    if not run["gold"]:
        rms.popitem()  # the judge
    alike = {pm: {rm: ordered_alike(judged[rm][pm], judge[pm]) for rm in rms} for pm in answers}
    say(f"agreement with {'gold' if run['gold'] else list(judged)[-1]}\n{'answers of':12}"
        + "".join(f"{rm:>8}" for rm in rms) if rms else "one reward model and no gold: nothing to agree with")
    for pm, row in alike.items() if rms else []:
        say(f"{pm:12}" + "".join(f"{share:8.3f}" for share in row.values()))
    say("PM-RM disagreement")
    apart = disagreement(run)
    for phase, share in apart.items():
        say(f"{phase:12}{share:8.3f}")
    if o.json:
        write_json(o.json, dict(agreement=alike, disagreement=apart))

def disagreement(run):
    """{E-step: share of DPO pairs in the epoch's second half that β log π/π_{t−1} orders against the RM}."""
    return {phase: float(1 - np.mean([row["rewards/accuracies"] for row in rows[len(rows) // 2:]]))
            for phase, rows in figures.training_lines(run, "E")}

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
        files = {g["policy"]: run["folder"] / "test" / g["policy"].replace(" ", "") / "r0.jsonl"
                 for g in run["gold"]}
        rows = {pm: [row | {"gold": gold_of(row)} for row in figures.stream(file)]
                for pm, file in files.items() if file.exists()}  # rounds after a stop have none
    else:
        rows = {f"PM {s['pm']}": figures.stream(run["folder"] / s["phase"] / "samples.jsonl")
                for s in figures.e_steps(run)}
    return {pm: list(islice(by_prompt(some), None if run["gold"] else prompts)) for pm, some in rows.items()}

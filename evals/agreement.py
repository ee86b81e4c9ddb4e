"""Measures how often a run's reward models agree with gold on the answers of its policies. Without gold, the
run's last reward model takes its place.

    python eval.py agreement --run runs/mt
"""
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

import reward
from common.data import by_prompt, load_tokenizer
from common.models import context_of, load_policy, local_folder
from common.packing import collate, pair_rows
from common.parallel import Problem, device, replicate, say
from common.run import option, write_json
from common.toy import gold_of
from dpo import ResponseLogps
from evals import figures
from evals.stats import JSON, ordered_alike

@dataclass
class Agreement:
    run: str = option(help="run folder")
    prompts: int = option(200, "without gold: how many of each E-step's first prompts are used")
    score_batch: int = 8
    json: str = option("", JSON)

def agreement(o):
    """Print how often each reward model orders two answers of a policy to a prompt as the judge does (gold,
    or the last reward model), and how often policy and reward model disagree on the pairs for DPO."""
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
        + "".join(f"{rm:>8}" for rm in rms) if rms else "no gold and one reward model: nothing to compare")
    for pm, row in alike.items() if rms else []:
        say(f"{pm:12}" + "".join(f"{share:8.3f}" for share in row.values()))
    say("PM-RM disagreement: share of the DPO pairs that the policy orders against the reward model")
    apart = disagreement(run)
    for phase, share in apart.items():
        say(f"{phase:12}{share:8.3f}")
    if o.json:
        write_json(o.json, dict(agreement=alike, disagreement=apart))

def disagreement(run):
    """Return {E-step: share of its DPO pairs that the policy orders against the reward model}. The policy
    prefers the answer with the larger β log π/π_{t−1}. The second half of the epoch's steps is counted."""
    return {phase: float(1 - np.mean([row["rewards/accuracies"] for row in rows[len(rows) // 2:]]))
            for phase, rows in figures.training_lines(run, "E")}

def policy_margins(new_policy, old_policy, pairs, batch):
    """Return log π_new/π_old of the chosen answer minus that of the rejected one, in nats, for each pair that
    fits into the context (N,). Policies are folders, and have the same tokenizer. In the long run this is
    what Bradley-Terry learns from "the new policy's answer is better"."""
    rows, _ = pair_rows(load_tokenizer(new_policy), pairs, context_of(new_policy), policy=True)
    margins = []
    for folder in (new_policy, old_policy):
        policy = ResponseLogps(replicate(load_policy(folder)))
        with torch.inference_mode():
            logps = torch.cat([policy(collate(rows[at:at + batch], device()))
                               for at in range(0, len(rows), batch)])
        margins.append((logps[::2] - logps[1::2]).cpu().numpy())
    return margins[0] - margins[1]

def rms_of(run):
    """Return {name: folder} of the run's reward models, with the base first."""
    made = [run["folder"] / s["phase"] / "rm" for s in figures.m_steps(run)]
    base = run["settings"].get("rm")
    if not base:
        raise Problem(f"{run['folder']}: run.json does not name the base reward model")
    return {f"RM {i}": local_folder(str(folder)) for i, folder in enumerate([base, *made])}

def answers_of(run, prompts):
    """Return {policy: a list of each prompt's rows}. With gold, these are the answers to the test prompts
    after each round, with a field `gold`. Without it, they are the samples for the first `prompts` prompts
    of each E-step."""
    if run["gold"]:
        files = {g["policy"]: run["folder"] / "test" / g["policy"].replace(" ", "") / "r0.jsonl"
                 for g in run["gold"]}
        rows = {pm: [row | {"gold": gold_of(row)} for row in figures.stream(file)]
                for pm, file in files.items() if file.exists()}  # a round after a stop has no file
    else:
        rows = {f"PM {s['pm']}": figures.stream(run["folder"] / s["phase"] / "samples.jsonl")
                for s in figures.e_steps(run)}
    return {pm: list(islice(by_prompt(some), None if run["gold"] else prompts)) for pm, some in rows.items()}

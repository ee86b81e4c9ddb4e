"""Measures how often a run's reward models agree with a judge on the answers of its policies. The judge is
gold or, without gold, the run's last reward model. Or it is an outside one, a model or people. It gets a
file with two answers of the last policy to each prompt, and sets `chosen` to 0 or 1, the better one's place.

    python eval.py agreement --run runs/mt
    python eval.py agreement --run runs/mt --prompts prompts.jsonl --write verdicts.jsonl
    python eval.py agreement --run runs/mt --verdicts verdicts.jsonl
"""
from dataclasses import dataclass
from itertools import islice

import numpy as np

import reward
from common.data import by_prompt, check_prompt, prompt_id, read_jsonl, read_prompts, read_rows, seed_of
from common.models import local_folder, prompts_that_fit
from common.parallel import Problem, say
from common.run import claim, exists, option, parts_of, remove, write_json, write_rows
from common.toy import gold_of
from evals import figures
from evals.alpaca import AlpacaGenerate  # the options on which answers for a judge depend
from evals.rewardbench import judge_pairs
from evals.stats import JSON, ordered_alike, publish, share, standard_error
from sampler import sample

@dataclass
class Agreement:
    run: str = option(help="run folder")
    first: int = option(200, "without gold: how many of each E-step's first prompts are used")
    prompts: str = option("", "with --write: JSONL, JSON, parquet or hub id with a field `prompt`")
    write: str = option("", "new JSONL file for an outside judge, with two answers to each prompt")
    verdicts: str = option("", "that file, after the judge has set `chosen` in each row")
    score_batch: int = 8
    json: str = option("", JSON)

def agreement(o):
    """The command. Without an outside judge it prints how often each reward model orders two answers as gold
    or the last reward model does, and how often policy and reward model disagree on the pairs for DPO."""
    if bool(o.write) != bool(o.prompts) or o.write and o.verdicts:
        raise Problem("--prompts and --write belong together, and --verdicts is given without them")
    if o.write or o.verdicts:
        return (write_answers if o.write else compare_with_verdicts)(o)
    run, judged = figures.load(o.run), {}
    answers, rms = answers_of(run, o.first), rms_of(run)
    for rm, folder in rms.items():
        model, tokenizer = reward.load(folder)
        judged[rm] = {pm: reward.score_answers(model, tokenizer, [
            (group[0]["prompt"], [row["response"] for row in group]) for group in groups], o.score_batch)
            for pm, groups in answers.items()}
    names = [*rms]
    judge = {pm: [[row["gold"] for row in group] for group in groups] for pm, groups in answers.items()} \
        if run["gold"] else judged[names.pop()]
    alike = {pm: {rm: ordered_alike(judged[rm][pm], judge[pm]) for rm in names} for pm in answers}
    if names:
        say(f"agreement with {'gold' if run['gold'] else [*rms][-1]}")
        say(f"{'answers of':12}" + "".join(f"{rm:>8}" for rm in names))
        for pm, row in alike.items():
            say(f"{pm:12}" + "".join(f"{share:8.3f}" for share in row.values()))
    else:
        say("no gold and one reward model: nothing to compare")
    say("PM-RM disagreement: share of the DPO pairs that the policy orders against the reward model")
    apart = disagreement(run)
    for phase, part in apart.items():
        say(f"{phase:12}{part:8.3f}")
    if o.json:
        write_json(o.json, dict(agreement=alike, disagreement=apart))

def disagreement(run):
    """Return {E-step: share of its DPO pairs that the policy orders against the reward model}. The policy
    prefers the answer with the larger β log π/π_{t−1}. The second half of the epoch's steps is counted."""
    return {phase: float(1 - np.mean([row["rewards/accuracies"] for row in rows[len(rows) // 2:]]))
            for phase, rows in figures.training_lines(run, "E")}

def rms_of(run):
    """Return {name: folder} of the run's reward models, with the base first."""
    made = [run["folder"] / s["phase"] / "rm" for s in figures.m_steps(run)]
    return {f"RM {i}": local_folder(str(folder)) for i, folder in enumerate([setting(run, "rm"), *made])}

def setting(run, name):
    if run["settings"].get(name) in (None, ""):
        raise Problem(f"{run['folder']}: run.json has no setting {name!r}; is it the one that mt.py wrote?")
    return run["settings"][name]

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

def write_answers(o):
    """Sample two answers of the run's last policy to each prompt, and write them for the judge in an order
    that is drawn. A file that is complete is left alone, because it may have verdicts already."""
    run = figures.load(o.run)
    made = [run["folder"] / s["phase"] / "policy" for s in figures.e_steps(run) if s["chosen"]]
    policy = local_folder(str([setting(run, "policy"), *made][-1]))  # a copied run may lack RUN/policy
    how = {name: setting(run, name) for name in ("temperature", "top_p", "max_new_tokens")}
    seed, batch = setting(run, "seed"), setting(run, "sample_batch")
    prompts, _ = prompts_that_fit(rms_of(run)["RM 0"], read_prompts(o.prompts)[0], how["max_new_tokens"])
    prompts, _ = prompts_that_fit(policy, prompts)
    try:
        claim(o.write, AlpacaGenerate(policy, o.prompts, **how, seed=seed, sample_batch=batch), file=True)
    except Problem as problem:  # other commands call this flag --out
        raise Problem(str(problem).replace("--out", "--write")) from None
    if not exists(o.write):
        raw = parts_of(o.write) / "samples.jsonl"  # in the folder where `claim` looks for unfinished work
        sample(policy, prompts, raw, samples=2, **how, seed=f"{seed}/judge", rows=batch)
        rows = [dict(prompt=a["prompt"], answers=sorted(  # by a hash, so that the place says nothing
            [a["response"], b["response"]], key=lambda text: seed_of(seed, prompt_id(a["prompt"]), text)),
            chosen=None) for a, b in by_prompt(read_jsonl(raw)) if a["response"] != b["response"]]
        write_rows(o.write, rows)
        remove(parts_of(o.write))
        say(f"{len(rows)} pairs; {len(prompts) - len(rows)} prompts got the same answer twice: left out")
    say(f"{o.write} is complete; set `chosen` in each row to 0 or 1, the place of the better answer")

def compare_with_verdicts(o):
    """Print how often each reward model gives the answer that the judge prefers the higher reward. `gain` is
    the mean difference from the base reward model, pair by pair, so its interval is that of paired data."""
    pairs = []
    for where, row in read_rows(o.verdicts):
        answers, place = row.get("answers"), repr(row.get("chosen"))  # 1.0 and true are not 1
        if place not in ("0", "1") or not isinstance(answers, list) or [*map(type, answers)] != [str, str]:
            raise Problem(f"{where}: set `chosen` to 0 or 1, the place of the better one of two texts in "
                          "`answers`; delete the row if neither is better")
        pairs.append(dict(prompt=check_prompt(where, row.get("prompt")), chosen=answers[int(place)],
                          rejected=answers[1 - int(place)]))
    # All reward models have the tokenizer and the context of the base, so the same pairs fit into each.
    right = {rm: 1.0 * judge_pairs(folder, pairs, o.score_batch, 10**6)[1]
             for rm, folder in rms_of(figures.load(o.run)).items()}
    found = {rm: share(hits, "accuracy") for rm, hits in right.items()}
    for rm in [*right][1:]:
        change = right[rm] - right["RM 0"]
        gain, half = float(change.mean()), 1.959964 * standard_error(change)
        found[rm] |= dict(gain=gain, gain_ci_low=gain - half, gain_ci_high=gain + half)
    publish(found, o.json)
    rm, last = list(found.items())[-1]
    if rm == "RM 0":
        say("The run has no M-step, so there is no other reward model.")
    elif len(pairs) < 10 or last["gain_ci_low"] <= 0 <= last["gain_ci_high"]:
        say(f"These labels don't tell {rm} from RM 0: leave M-steps off (--update_rm false), or label more.")
    elif last["gain"] > 0:
        say(f"By these labels {rm} is better than RM 0 on the policy's answers, so M-steps may pay.")
    else:
        say(f"By these labels {rm} is worse than RM 0 on the policy's answers: leave M-steps off "
            "(--update_rm false).")

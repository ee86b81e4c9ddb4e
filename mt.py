"""Mutual-Taught (arXiv 2506.06292): policy (PM) and reward model (RM) train each other, without new labels.

    torchrun mt.py --rounds 3                                          # the embedded task, minutes on a CPU
    python mt.py --policy … --rm … --prompts … --plan                  # what a run takes, before it starts
    torchrun --nproc-per-node 8 mt.py --policy meta-llama/Meta-Llama-3-8B-Instruct \\
        --rm sfairXC/FsfairX-LLaMA3-RM-v0.1 --prompts HuggingFaceH4/ultrafeedback_binarized --out runs/llama3

A round is E(a), M(b), E(c), each on a third of the prompts of its own:
  E-step  sample from the policy, let the RM rank, train the policy by DPO, keep the best checkpoint
  M-step  compare the policy's answers before and after, filter by margin, train the base RM by Bradley-Terry

Each phase is a function from files to a file of the run folder, (o, what it is made from, its path), skipped
if that is there: the same command goes on after an interruption. To vary a step replace the function in the
module that defines it and call main(), as variants/ do. Without --policy, toy.SETTINGS are the defaults.
"""
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import dpo
import filter
import labels
import manifest
import models
import reward
import run
import toy
import training
from data import Lines, Problem, load_tokenizer, read_jsonl, read_selection
from evals import gold, plan, report
from parallel import rank, say
from progress import log_of, phase, say_end, timed
from rollout import means, sample_and_score
from run import option, show


@dataclass
class Options:
    policy: str = option("", "base policy: a folder or hub id; none: the embedded task")
    rm: str = option("", "base reward model: a folder or hub id")
    prompts: str = option("", "JSONL, JSON, parquet or hub id with a field `prompt`")
    prompt_field: str = option("", "where in a row the prompt stands, if not under a usual name")
    skip_long: bool = option(False, "leave out prompts that are too long for policy or RM")
    rounds: int = option(1, "rounds of E, M, E")
    out: str = option("", "run folder; none: runs/ and the script's name, or runs/toy for the embedded task")
    seed: int = option(0)
    samples: int = option(5, "responses per prompt in the E-step (M)")
    temperature: float = option(0.8)
    top_p: float = option(0.95)
    max_new_tokens: int = option(1024, "longest response (not given in the paper)")
    max_length: int = option(2048, "tokens of prompt and answer; longer pairs are left out")
    beta: float = option(0.01, "DPO's β")
    policy_lr: float = option(7e-7)
    policy_batch: int = option(128, "pairs per optimiser step, over all processes")
    rm_lr: float = option(2e-6)
    rm_batch: int = option(512, "pairs per optimiser step, over all processes")
    save_every: int = option(50, "steps between checkpoints for model selection")
    select_prompts: int = option(2000, "prompts held out for model selection (D_MS)")
    tau: float = option(0.6, "a best win rate below this stops the run")
    update_rm: bool = option(True, "false: no M-step, which is iterative DPO")
    select: bool = option(True, "false: keep the last checkpoint, never stop")
    filter: bool = option(True, "false: train the RM on all comparisons")
    anchor: str = option("", "labelled pairs, up to 1:1 with the others that the RM trains on (labels.py)")
    labels: int = option(0, "pairs of the policy's answers to be labelled per round, for the RM")
    labeller: str = option("", "command that labels a JSONL file; none: the run stops till it is done")
    spot_check: int = option(0, "comparisons to be labelled: no M-step where most favour the old policy")
    spot_check_stops: bool = option(False, "such a spot check ends the run, too, with the old policy")
    gate: str = option("", "labelled pairs held out: an RM that doesn't order more of them is dropped")
    sample_batch: int = option(64, "responses decoded at a time in each process")
    score_batch: int = option(8, "prompts scored at a time in each process")
    micro_batch: int = option(2, "pairs per forward pass and process in training")
    resume_every: int = option(0, "steps of training that a kill may cost; 0: all")
    log_every: int = option(0, "steps of training between lines on the screen; 0: none, just a bar")
    report_to: str = option("", "wandb or tensorboard: the metrics there, too")
    recompute: bool = option(torch.cuda.is_available(), "recompute activations: slower, less memory")


def mutual_taught(o):
    """The loop of the paper, from the base models. The run's last ones are OUT/policy and OUT/rm."""
    policy, rm, subsets = o.policy, o.rm, split(o)
    link(o, policy, rm, Path(o.out) / "round1" / "e1")
    for number in range(o.rounds):
        folder = Path(o.out) / f"round{number + 1}"
        a, b, c = (subsets[(number + i) % 3] for i in range(3))
        new_policy = e_step(o, policy, rm, a, folder / "e1")
        if not new_policy:
            break
        if o.update_rm:
            rm = m_step(o, policy, new_policy, rm, b, folder / "m", folder / "e1" / "pairs.jsonl")
        policy = new_policy
        link(o, policy, rm, folder / "e2")

        new_policy = e_step(o, policy, rm, c, folder / "e2")
        if not new_policy:
            break
        policy = new_policy
        link(o, policy, rm, Path(o.out) / f"round{number + 2}" / "e1")


def e_step(o, policy, rm, prompts, folder, judge=None):
    """π_{t−1}, r → π_t: a folder, or None where no checkpoint has a win rate of at least τ against π_{t−1}.
    judge: what scores responses in the place of reward.score."""
    samples = scored_samples(o, policy, rm, prompts, folder / "samples.jsonl", o.samples, judge)
    pairs = make_pairs(o, samples, folder / "pairs.jsonl")
    selection = folder / "selection.json"
    if manifest.due(o.out, selection, pairs, Path(rm).parent):
        checkpoints = train_policy(o, policy, pairs, folder / "checkpoints")
        select(o, policy, rm, checkpoints, selection, judge)
    kept = read_selection(manifest.done(o.out, selection))["chosen"]
    if kept and not any([run.exists(folder / name) for name in ("policy", "checkpoints")]):
        raise Problem(f"{folder / 'policy'} is gone; put it back, or delete {selection} to train it anew")
    if kept and manifest.due(o.out, folder / "policy") and rank() == 0:
        os.replace(folder / "checkpoints" / kept, folder / "policy")
    run.remove_all(folder / "checkpoints", training.resume_of(folder / "checkpoints"))  # the losers go
    return str(manifest.done(o.out, folder / "policy")) if kept else None


def m_step(o, old_policy, new_policy, rm, prompts, folder, ranked, judge=None):
    """π_{t−1}, π_t, r → r': a folder. ranked: the pairs of the E-step before."""
    new, old = (scored_samples(o, policy, rm, prompts, folder / f"{name}.jsonl", judge=judge)
                for policy, name in ((new_policy, "new"), (old_policy, "old")))
    comparisons = make_comparisons(o, new, old, folder / "comparisons.jsonl")
    if o.spot_check and not labels.favours_new(o, comparisons, folder / "spot_check.jsonl"):
        return rm
    if o.labels:
        own = scored_samples(o, new_policy, rm, prompts, folder / "own.jsonl", 2, judge)
        labels.ask(o, folder / "labels.jsonl", labels.unsure(read_jsonl(own), o.labels), own)
    preferences = mix(o, comparisons, ranked, old_policy, folder / "preferences.jsonl")
    return labels.gated(o, rm, train_reward(o, preferences, folder / "rm"), folder / "gate.json")


# ---------------------------------------------------------------- phases: from files to files
def split(o):
    """Shuffle the prompts once; D_MS first, the rest in three equal subsets. Returns the subsets' files."""
    held_out, *files = (Path(o.out) / "prompts" / f"{part}.jsonl" for part in ("select", "s0", "s1", "s2"))
    if manifest.due(o.out, files[2]):
        for model, trained in ((o.policy, True), (o.rm, o.update_rm)):
            for in_training in {False, trained}:
                models.check_fits(model, in_training)
        prompts, _, repeats = models.read_fitting_prompts(o)  # what is too long is said now
        third = (len(prompts) - o.select_prompts) // 3
        if third < 1:
            raise Problem(f"{o.prompts}: {len(prompts)} different prompts; --select_prompts "
                          f"{o.select_prompts} and three subsets need at least {o.select_prompts + 3}")
        shuffled = [{"prompt": prompts[i]} for i in np.random.default_rng(o.seed).permutation(len(prompts))]
        say(f"{len(prompts)} prompts ({repeats} repeated ones left out): "
            f"{o.select_prompts} for model selection, three subsets of {third}")
        models.say_room(o, -(-third // o.policy_batch))
        run.write_rows(held_out, shuffled[:o.select_prompts])
        for i, file in enumerate(files):
            run.write_rows(file, shuffled[o.select_prompts + i * third:o.select_prompts + (i + 1) * third])
    return [manifest.done(o.out, file) for file in (held_out, *files)][1:]


@timed
def scored_samples(o, policy, rm, prompts, path, samples=1, judge=None):
    """Responses of `policy` to every prompt of a file, scored by `rm`."""
    manifest.due(o.out, path, prompts, Path(policy).parent, Path(rm).parent)  # refuses what is older
    rows = sample_and_score(o, policy, rm, [row["prompt"] for row in read_jsonl(prompts)], samples,
                            f"{o.seed}/{phase(o, path)}", path, judge)
    say("{}: {} responses, reward {score:.3f}, {tokens:.1f} tokens, {finished:.1%} finished".format(
        phase(o, path), len(rows), **means(rows, "score", "tokens", "finished")))
    return manifest.done(o.out, path)


def make_pairs(o, samples, path):
    if manifest.due(o.out, path, samples):
        rows = Lines(samples)
        pairs, without = filter.preference_pairs(rows)
        if not pairs:
            raise Problem(f"{samples}: not one prompt gives a pair: all rewards or texts are equal")
        log_of(o, path)(prompts_without_pair=without, **means(rows, "score", "tokens", "finished"),
            **means(pairs, "chosen_score", "rejected_score", "chosen_tokens", "rejected_tokens"))
        run.write_rows(path, pairs)
        say(f"{len(pairs)} pairs, {without} prompts give none. The first:")
        show(pairs[0], "chosen", "rejected")
    return manifest.done(o.out, path)


@timed
def train_policy(o, policy, pairs, path):
    """DPO; returns the checkpoints, in order of steps."""
    if manifest.due(o.out, path, pairs):
        run.remove_all(path.with_name("select"), path.with_name("policy"))  # of checkpoints before
        with run.writing(path, go_on=training.resume_of(path).exists()) as temporary:
            for step, steps, trained in dpo.train(
                    policy, read_jsonl(pairs), beta=o.beta, lr=o.policy_lr, batch=o.policy_batch, seed=o.seed,
                    micro_batch=o.micro_batch, max_length=o.max_length, recompute=o.recompute,
                    resume=(training.resume_of(path), o.resume_every), log=log_of(o, path)):
                if step == steps or o.select and step % o.save_every == 0:
                    models.save(trained, policy, temporary / f"step-{step}")
    return sorted(path.iterdir(), key=lambda p: int(p.name.removeprefix("step-")))


def select(o, policy, rm, checkpoints, path, judge=None):
    """Model selection on D_MS: win rate of each checkpoint against π_{t−1} under the current RM."""
    def scores(model, name):
        prompts = Path(o.out) / "prompts" / "select.jsonl"
        rows = scored_samples(o, model, rm, prompts, path.parent / "select" / f"{name}.jsonl", judge=judge)
        return [row["score"] for row in read_jsonl(rows)]

    win_rates, best = {}, checkpoints[-1].name
    if o.select:
        before, after = scores(policy, "before"), [scores(str(c), c.name) for c in checkpoints]
        win_rates = {c.name: filter.win_rate(new, before) for c, new in zip(checkpoints, after)}
        best = max(win_rates, key=win_rates.get)
    kept = best if not o.select or win_rates[best] >= o.tau else None
    log = log_of(o, path)
    for step, rate in win_rates.items():
        say(f"{phase(o, path.parent)} {step}: win rate {rate:.3f}{' chosen' if step == kept else ''}")
        log(checkpoint=step, win_rate=rate, chosen=step == kept)
    if not kept:
        say(f"no checkpoint reaches a win rate of {o.tau}: {policy} stays and the run stops")
    run.write_json(path, dict(chosen=kept, win_rates=win_rates, tau=o.tau, policy_before=policy, rm=rm))


def make_comparisons(o, new, old, path):
    if manifest.due(o.out, path, new, old):
        rows = filter.compare(read_jsonl(new), read_jsonl(old), o.filter)
        log_of(o, path)(comparisons=len(rows), epsilon=rows[0]["epsilon"], **means(
            rows, "kept", "margin", "new_score", "old_score", "new_tokens", "old_tokens"))
        run.write_rows(path, rows)
        reasons = sorted(Counter(row["reason"] for row in rows).items())
        say(f"{sum(row['kept'] for row in rows)} of {len(rows)} comparisons kept, epsilon "
            f"{rows[0]['epsilon']:.4f}: {', '.join(f'{n} {why}' for why, n in reasons)}. The first:")
        show(rows[0], "new", "old")
    return manifest.done(o.out, path)


def mix(o, comparisons, ranked, old_policy, path):
    """What the RM trains on: the kept comparisons and all the RM-ranked pairs of the E-step just before."""
    if manifest.due(o.out, path, comparisons, ranked, path.with_name("labels.jsonl")):
        rows = [filter.preference(row, "new", "old", comparisons, row["new_policy"], row["old_policy"])
                for row in read_jsonl(comparisons) if row["kept"]]
        rows += [filter.preference(row, "chosen", "rejected", ranked, old_policy, old_policy)
                 for row in read_jsonl(ranked)]
        run.write_rows(path, rows + labels.more(o, len(rows), path))
    return manifest.done(o.out, path)


@timed
def train_reward(o, preferences, path):
    """Bradley-Terry, from the base RM each time: it has not seen these prompts. Returns the folder."""
    if manifest.due(o.out, path, preferences):
        pairs = read_jsonl(preferences)
        if not pairs:
            raise Problem(f"{preferences}: every comparison was dropped and there are no ranked pairs")
        with run.writing(path) as temporary:
            model = reward.train(o.rm, pairs, lr=o.rm_lr, batch=o.rm_batch, seed=o.seed,
                                 micro_batch=o.micro_batch, max_length=o.max_length, recompute=o.recompute,
                                 resume=(training.resume_of(path), o.resume_every), log=log_of(o, path))
            models.save(model, o.rm, temporary)
    run.remove_all(training.resume_of(path))
    return str(manifest.done(o.out, path))


# ---------------------------------------------------------------- what phases share
def link(o, policy, rm, following):
    """OUT/policy and OUT/rm are the run's last models. following: the next E-step's folder; where that is
    done, a run that goes on leaves them."""
    if not run.exists(following / "selection.json"):
        run.link(Path(o.out) / "policy", policy)
        run.link(Path(o.out) / "rm", rm)


def main(options=Options, **defaults):  # for variants: a subclass with flags of its own, other defaults
    if "--plan" in sys.argv:
        return plan.main(options, **defaults)
    o = run.parse(options, **defaults)
    embedded = not (o.policy or o.rm or o.prompts)
    if embedded:
        say("no --policy: running the embedded task (toy.py)")
        o = run.parse(options, **toy.SETTINGS | defaults)
    elif not (o.policy and o.rm and o.prompts):
        raise Problem("--policy, --rm and --prompts go together; without them it is the embedded task")
    labels.check(o)
    if o.samples < 2:
        raise Problem("--samples 1 makes no pairs; at least 2 are needed")
    if o.select and not o.select_prompts:
        raise Problem("--select_prompts 0 needs --select false")
    script = Path(sys.argv[0]).stem
    o = replace(o, out=o.out or f"runs/{'toy' if embedded and script == 'mt' else script}",
                **(toy.build(o.seed) if embedded else {}))
    o = replace(o, policy=models.local_folder(o.policy), rm=models.local_folder(o.rm))
    models.check_policy(o.policy)
    models.check_reward(o.rm)
    manifest.claim(o.out, o, templates={side: load_tokenizer(getattr(o, side)).chat_template
                                        for side in ("policy", "rm")})
    mutual_taught(o)
    (gold.measure if embedded else gold.by_base)(o)
    report.report(o.out)
    say_end(o)


if __name__ == "__main__":
    run.launch(main)

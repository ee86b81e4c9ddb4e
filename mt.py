"""Mutual-Taught (arXiv 2506.06292): a policy and a reward model train each other, without new labels.

    torchrun mt.py --rounds 3                              # the embedded task: two minutes on a CPU
    torchrun --nproc-per-node 8 mt.py --policy POLICY --rm RM --prompts PROMPTS --out runs/mt

A round is an E-step, an M-step and another E-step, each on a third of the prompts:
  E-step  sample from the policy, let the reward model (RM) rank the samples, train the policy by DPO on a
          short good one and the worst, keep the checkpoint that wins most often against the policy before
  M-step  compare answers of the policy before and after, drop those comparisons that the RM contradicts
          clearly, train the base RM on the rest by Bradley-Terry

The loop is `mutual_taught`. A function marked @phase makes the file or folder `path` in the run folder. It is
skipped if that exists, so the same command continues an interrupted run. Its caller gets `path`; what its
body returns is printed. All processes run all of this, and rank 0 alone writes (run.write_rows and others).

To vary a step, replace its function in the module that defines it and call main(), as variants/ do. Without
--policy the run is on the small task of common/toy.py, with the defaults in its SETTINGS.
"""
import os
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import dpo
import filter
import reward
from common import models, run, toy
from common.data import load_tokenizer, read_json, read_jsonl, read_prompts
from common.parallel import Problem, say
from common.run import option, phase
from eval import report
from evals import gold
from evals.stats import means, wilson

@dataclass
class Options:
    policy: str = option("", "base policy: a folder or hub id (default: the embedded task)")
    rm: str = option("", "base reward model: a folder or hub id")
    prompts: str = option("", "JSONL, JSON, parquet or hub id with a field `prompt`")
    rounds: int = option(1, "rounds of E, M, E")
    out: str = option("", "run folder (default: runs/ and the name of the script; of mt.py, runs/toy)")
    overwrite: bool = option(False, "delete the run that --out holds and start again")
    seed: int = option(0)
    samples: int = option(5, "responses per prompt in the E-step (M)", group="sampling")
    temperature: float = option(0.8)
    top_p: float = option(0.95)
    max_new_tokens: int = option(1024, "longest response (not given in the paper)")
    max_length: int = option(2048, "leave out pairs whose prompt and answer have more tokens", group="E-step")
    beta: float = option(0.01, "DPO's β")
    policy_lr: float = option(7e-7)
    policy_batch: int = option(128, "pairs per optimiser step, over all processes")
    save_every: int = option(50, "steps between checkpoints for model selection")
    select_prompts: int = option(2000, "prompts held out for model selection (D_MS)")
    tau: float = option(0.6, "a best win rate below this stops the run")
    rm_lr: float = option(2e-6, group="M-step")
    rm_batch: int = option(512, "pairs per optimiser step, over all processes")
    update_rm: bool = option(True, "false: no M-step, so iterative DPO", group="the paper's ablations")
    select: bool = option(True, "false: keep the last checkpoint, never stop")
    filter: bool = option(True, "false: the RM trains on all comparisons")
    rm_pairs: str = option("both", "what the RM trains on: both, comparisons, or ranked (the E-step's pairs)")
    sample_batch: int = option(64, "responses decoded together in each process", "how much fits into memory")
    score_batch: int = option(8, "prompts scored at a time in each process")
    micro_batch: int = option(2, "pairs per forward pass and process in training")
    recompute: bool = option(torch.cuda.is_available(), "recompute activations: slower, less memory")

def mutual_taught(o):
    """The paper's loop: `--rounds` rounds of E, M, E from the base models."""
    policy, rm, prompts = o.policy, o.rm, Path(split(o, Path(o.out) / "prompts"))
    for number in range(o.rounds):
        folder = Path(o.out) / f"round{number + 1}"
        a, b, c = (prompts / f"s{(number + i) % 3}.jsonl" for i in range(3))
        new_policy = e_step(o, policy, rm, a, folder / "e1")
        if not new_policy:  # no checkpoint was better, so the run stops
            break
        if o.update_rm:
            rm = m_step(o, policy, new_policy, rm, b, folder / "m", folder / "e1" / "pairs.jsonl")
        policy = e_step(o, new_policy, rm, c, folder / "e2")
        if not policy:
            break

def e_step(o, policy, rm, prompts, folder, judge=None, judge_selects=True):
    """Train the policy π_{t−1} by DPO on its own samples, ranked by the reward model. Returns the folder of
    the new policy π_t, or None if no checkpoint wins at least the share τ of prompts against π_{t−1}.
    For variants: judge(prompt, its scored rows) -> scores in the place of the reward model's. judge_selects:
    whether these scores also decide which checkpoint wins."""
    samples = scored_samples(o, policy, rm, prompts, folder / "samples.jsonl", samples=o.samples, judge=judge)
    pairs = make_pairs(o, samples, folder / "pairs.jsonl")
    selection = train_and_select(o, policy, rm, pairs, folder / "selection.json",
                                 judge=judge if judge_selects else None)
    chosen = read_json(selection)["chosen"]
    kept = keep_checkpoint(o, selection, folder / "policy", checkpoint=chosen) if chosen else None
    run.remove(folder / "checkpoints")  # the chosen one was moved out of it
    link_last(o)
    return kept

def m_step(o, old_policy, new_policy, rm, prompts, folder, ranked, judge=None):
    """Train the base reward model on comparisons of the new policy's answers with the old one's, and on the
    pairs of the E-step just before, `ranked`. Returns the folder of the new reward model."""
    new = scored_samples(o, new_policy, rm, prompts, folder / "new.jsonl", judge=judge)
    old = scored_samples(o, old_policy, rm, prompts, folder / "old.jsonl", judge=judge)
    comparisons = make_comparisons(o, new, old, folder / "comparisons.jsonl")
    preferences = mix(o, comparisons, ranked, old_policy, folder / "preferences.jsonl")
    new_rm = train_reward(o, preferences, folder / "rm")
    link_last(o)
    return new_rm

def link_last(o):
    """Let the links OUT/policy and OUT/rm point to the last models that the run has made."""
    for kind, base in (("policy", o.policy), ("rm", o.rm)):
        made = sorted(Path(o.out).glob(f"round*/*/{kind}"), key=lambda p: (int(p.parts[-3][5:]), p))
        run.on_rank0(run.link, Path(o.out) / kind, [base, *made][-1])

# ---------------------------------------------------------------- phases: each makes a file or folder, `path`
@phase
def split(o, path):
    """Shuffle the prompts once. The first ones are D_MS, held out for model selection (select.jsonl); the
    rest is cut into three equal subsets (s0.jsonl to s2.jsonl)."""
    for model, training in (o.policy, False), (o.policy, True), (o.rm, False), (o.rm, o.update_rm):
        models.check_fits(model, training)
    prompts, repeats = read_prompts(o.prompts)
    prompts, _ = models.prompts_that_fit(o.rm, prompts, o.max_new_tokens)
    prompts, _ = models.prompts_that_fit(o.policy, prompts)
    count, third = len(prompts), (len(prompts) - o.select_prompts) // 3
    if third < 1:
        raise Problem(f"{o.prompts}: {count} prompts; --select_prompts {o.select_prompts} and three subsets "
                      f"need at least {o.select_prompts + 3}; --select_prompts {count // 6 or 1} fits")
    shuffled = [{"prompt": prompts[i]} for i in np.random.default_rng(o.seed).permutation(len(prompts))]
    with run.writing(path) as temporary:
        run.write_rows(temporary / "select.jsonl", shuffled[:o.select_prompts])
        for i in range(3):
            run.write_rows(temporary / f"s{i}.jsonl", shuffled[o.select_prompts:][i * third:(i + 1) * third])
    return (f"{len(prompts)} prompts ({repeats} repeated ones left out): {o.select_prompts} for model "
            f"selection, three subsets of {third}")

@phase
def scored_samples(o, policy, rm, prompts, path, samples=1, judge=None):
    """Sample responses of the policy to all prompts of a file, and score them with the reward model."""
    reward.sample_and_score(o, policy, rm, [row["prompt"] for row in read_jsonl(prompts)], samples,
                            f"{o.seed}/{run.name_of(o, path)}", path, judge)
    rows = read_jsonl(path)
    found = means(rows, "score", "tokens", "finished")
    if samples > 1 and found["finished"] < 0.5:  # the E-step's own samples
        say("WARNING: most responses are cut off, so the policy may learn little but to end; use a larger "
            "--max_new_tokens")
    return "{} responses, reward {score:.3f}, {tokens:.1f} tokens, {finished:.1%} finished".format(
        len(rows), **found), sum(row["tokens"] for row in rows)

@phase
def make_pairs(o, samples, path):
    """Take a chosen and a rejected response of each prompt (filter.py: preference_pairs)."""
    rows = read_jsonl(samples)
    pairs, without = filter.preference_pairs(rows)
    if not pairs:
        raise Problem(f"{samples}: no prompt gives a pair, because all rewards or all texts are equal")
    run.log_of(o, path)(prompts_without_pair=without, **means(rows, "score", "tokens", "finished"), **means(
        pairs, "chosen_score", "rejected_score", "chosen_tokens", "rejected_tokens"))
    run.write_rows(path, pairs)
    return f"{len(pairs)} pairs; {without} prompts gave none"

@phase
def train_policy(o, policy, pairs, path):
    """Train the policy by DPO. Its checkpoints are the folders step-N in `path`."""
    with run.writing(path) as temporary:
        for step, steps, trained in dpo.train(
                policy, read_jsonl(pairs), beta=o.beta, lr=o.policy_lr, batch=o.policy_batch, seed=o.seed,
                micro_batch=o.micro_batch, max_length=o.max_length, recompute=o.recompute,
                log=run.log_of(o, path)):
            if step == steps or o.select and step % o.save_every == 0:
                models.save(trained, policy, temporary / f"step-{step}")

@phase
def train_and_select(o, policy, rm, pairs, path, judge=None):
    """Train by DPO, and choose the checkpoint that wins against π_{t−1} on most prompts of D_MS, judged by
    the current reward model. If its win rate is below τ, none is chosen."""
    folder = Path(train_policy(o, policy, pairs, path.with_name("checkpoints")))
    checkpoints = sorted((p.name for p in folder.iterdir()), key=lambda name: int(name.removeprefix("step-")))
    win_rates, best = {}, checkpoints[-1]

    def scores(model, name):
        prompts, file = Path(o.out) / "prompts" / "select.jsonl", path.parent / "select" / f"{name}.jsonl"
        return [row["score"] for row in read_jsonl(scored_samples(o, model, rm, prompts, file, judge=judge))]

    if o.select:
        before = scores(policy, "before")
        win_rates = {name: filter.win_rate(scores(folder / name, name), before) for name in checkpoints}
        best = max(win_rates, key=win_rates.get)
    chosen = best if not o.select or win_rates[best] >= o.tau else None
    log = run.log_of(o, path)
    for name, rate in win_rates.items():
        log(checkpoint=name, win_rate=rate, chosen=name == chosen)
    run.write_json(path, dict(chosen=chosen, win_rates=win_rates, tau=o.tau, policy_before=str(policy),
                              rm=str(rm)))
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in win_rates.items())
    return f"win rates: {rates or 'none, --select is false'}; " + (
        f"{chosen} is kept" if chosen else f"none reaches {o.tau}, so {policy} stays and the run stops")

@phase
def keep_checkpoint(o, selection, path, checkpoint):
    """Move the chosen checkpoint to where the policy of this step belongs."""
    source = path.with_name("checkpoints") / checkpoint
    if not run.exists(source):
        raise Problem(f"{path} is missing; put it back, or have it trained again by deleting {selection} and "
                      f"{path.with_name('select')}")
    run.on_rank0(os.replace, source, path)

@phase
def make_comparisons(o, new, old, path):
    """Compare the new policy's response with the old one's for each prompt (filter.py: compare)."""
    rows = filter.compare(read_jsonl(new), read_jsonl(old), o.filter)
    run.log_of(o, path)(comparisons=len(rows), epsilon=rows[0]["epsilon"], **means(
        rows, "kept", "margin", "new_score", "old_score", "new_tokens", "old_tokens"))
    run.write_rows(path, rows)
    reasons = ", ".join(f"{n} {why}" for why, n in sorted(Counter(row["reason"] for row in rows).items()))
    return (f"{sum(row['kept'] for row in rows)} of {len(rows)} comparisons kept, epsilon "
            f"{rows[0]['epsilon']:.4f}: {reasons}")

@phase
def mix(o, comparisons, ranked, old_policy, path):
    """Join the pairs for the reward model: the kept comparisons, and all pairs of the E-step just before."""
    def shared(row):
        return {name: row[name] for name in ("prompt", "weight") if name in row}
    rows = [dict(shared(row), chosen=row["new"], rejected=row["old"], source=str(comparisons),
                 chosen_policy=row["new_policy"], rejected_policy=row["old_policy"])
            for row in read_jsonl(comparisons) if row["kept"] and o.rm_pairs != "ranked"]
    rows += [dict(shared(row), chosen=row["chosen"], rejected=row["rejected"], source=str(ranked),
                  chosen_policy=str(old_policy), rejected_policy=str(old_policy))
             for row in read_jsonl(ranked) if o.rm_pairs != "comparisons"]
    run.write_rows(path, rows)
    return f"{len(rows)} pairs"

@phase
def train_reward(o, preferences, path):
    """Train by Bradley-Terry. Each M-step starts from the base reward model, as in the paper."""
    pairs = read_jsonl(preferences)
    if not pairs:
        raise Problem(f"{preferences}: there are no pairs; was every comparison dropped?")
    with run.writing(path) as temporary:
        model = reward.train(o.rm, pairs, lr=o.rm_lr, batch=o.rm_batch, seed=o.seed, log=run.log_of(o, path),
                             micro_batch=o.micro_batch, max_length=o.max_length, recompute=o.recompute)
        models.save(model, o.rm, temporary)

def main(options=Options, **defaults):
    """Run the loop. A variant may give a subclass of Options, with flags of its own, and other defaults."""
    flags = " ".join(f"--{name} {value}" for name, value in (toy.SETTINGS | defaults).items())
    about = textwrap.fill(f"The embedded task's defaults are {flags}", 110)
    o = run.parse(options, about=f"{sys.modules['__main__'].__doc__ or ''}\n{about}", **defaults)
    embedded = not (o.policy or o.rm or o.prompts)
    if embedded:
        say("no --policy given, so this runs the embedded task (common/toy.py)")
        o = run.parse(options, **toy.SETTINGS | defaults)
    elif not (o.policy and o.rm and o.prompts):
        raise Problem("give --policy, --rm and --prompts together, or none of them for the embedded task")
    if o.samples < 2:
        raise Problem("--samples 1 gives no pairs; it must be at least 2")
    if o.select and not o.select_prompts:
        raise Problem("--select_prompts 0 needs --select false")
    if o.rm_pairs not in ("both", "comparisons", "ranked"):
        raise Problem(f"--rm_pairs {o.rm_pairs} must be both, comparisons or ranked")
    if o.select and 0.5 < o.tau < wilson(0.5, o.select_prompts)[1]:
        say(f"WARNING: with {o.select_prompts} --select_prompts a policy that is as good as before may reach "
            f"--tau {o.tau} by chance, and a better one miss it")
    script = Path(sys.argv[0]).stem
    o = replace(o, out=o.out or f"runs/{'toy' if embedded and script == 'mt' else script}",
                **(toy.build(o.seed) if embedded else {}))
    o = replace(o, policy=models.local_folder(o.policy), rm=models.local_folder(o.rm))
    models.check_policy(o.policy)
    models.check_reward(o.rm)
    run.claim(o.out, o, script=script, templates={
        side: load_tokenizer(getattr(o, side)).chat_template for side in ("policy", "rm")})
    mutual_taught(o)
    (gold.measure if embedded else gold.by_base)(o)
    report(o.out)
    say(f"policy: {Path(o.out) / 'policy'}; reward model: {Path(o.out) / 'rm'}")

if __name__ == "__main__":
    run.launch(main)

"""Mutual-Taught (arXiv 2506.06292): a policy (PM) and a reward model (RM) train each other,
with no new human labels.

    torchrun mt.py --rounds 3                                          # the embedded task, minutes on a CPU
    torchrun --nproc-per-node 8 mt.py --policy meta-llama/Meta-Llama-3-8B-Instruct \\
        --rm sfairXC/FsfairX-LLaMA3-RM-v0.1 --prompts HuggingFaceH4/ultrafeedback_binarized --out runs/llama3

A round is E(a), M(b), E(c), each on a third of the prompts of its own:
  E-step  sample from the policy, let the RM rank, train the policy by DPO, keep the best checkpoint
  M-step  compare the policy's answers before and after, filter by margin, train the RM by Bradley-Terry
          from the base RM

Each phase is a function from files to files in the run folder and is skipped when its result is there: run
the same command again to go on after an interruption. Several nodes need a file system that they share.
"""
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import dpo
import models
import parallel
import reward
import run
import toy
from data import Problem, load_tokenizer, read_jsonl, read_prompts, write_jsonl
from evals import gold
from evals.report import report
from filter import compare, preference_pairs, win_rate
from models import local_folder
from parallel import rank, say
from rollout import sample_and_score
from run import Log, exists, launch, write_json, writing
from sampler import encode_prompts


@dataclass
class Options:
    policy: str = field(default="",
                        metadata={"help": "base policy: a folder or hub id; none: the embedded task"})
    rm: str = field(default="", metadata={"help": "base reward model: a folder or hub id"})
    prompts: str = field(default="",
                         metadata={"help": "JSONL, JSON, parquet or hub id with a field `prompt`"})
    rounds: int = field(default=1, metadata={"help": "rounds of E, M, E"})
    out: str = field(default="runs/mt", metadata={"help": "run folder"})
    seed: int = 0
    samples: int = field(default=5, metadata={"help": "responses per prompt in the E-step (M)"})
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = field(default=1024, metadata={"help": "longest response (not given in the paper)"})
    max_length: int = field(default=2048,
                            metadata={"help": "tokens of prompt and answer; longer pairs are left out"})
    beta: float = field(default=0.01, metadata={"help": "DPO's β"})
    policy_lr: float = 7e-7
    policy_batch: int = field(default=128, metadata={"help": "pairs per optimiser step, over all processes"})
    rm_lr: float = 2e-6
    rm_batch: int = field(default=512, metadata={"help": "pairs per optimiser step, over all processes"})
    save_every: int = field(default=50, metadata={"help": "steps between checkpoints for model selection"})
    select_prompts: int = field(default=2000,
                                metadata={"help": "prompts held out for model selection (D_MS)"})
    tau: float = field(default=0.6, metadata={"help": "a best win rate below this stops the run"})
    update_rm: bool = field(default=True, metadata={"help": "false: no M-step, which is iterative DPO"})
    select: bool = field(default=True, metadata={"help": "false: keep the last checkpoint, never stop"})
    filter: bool = field(default=True, metadata={"help": "false: train the RM on all comparisons"})
    sample_batch: int = field(default=64, metadata={"help": "responses decoded at a time in each process"})
    score_batch: int = field(default=8, metadata={"help": "prompts scored at a time in each process"})
    micro_batch: int = field(default=2, metadata={"help": "pairs per forward pass and process in training"})
    recompute: bool = field(default_factory=torch.cuda.is_available,
                            metadata={"help": "gradient checkpointing: less memory, a third more time"})


def mutual_taught(o, out):
    """The loop of the paper, from the base policy and the base reward model.
    The run's last models are OUT/policy, OUT/rm."""
    policy, rm = o.policy, o.rm
    subsets = split(o, out)
    if not exists(out / "policy"):
        link(out, policy, rm)
    for number in range(o.rounds):
        folder = out / f"round{number + 1}"
        a, b, c = (subsets[(number + i) % 3] for i in range(3))

        new_policy = e_step(o, out, policy, rm, a, folder / "e1")
        if not new_policy:
            break
        if o.update_rm:
            rm = m_step(o, out, policy, new_policy, rm, b, folder)
        policy = new_policy
        link(out, policy, rm)

        new_policy = e_step(o, out, policy, rm, c, folder / "e2")
        if not new_policy:
            break
        policy = new_policy
        link(out, policy, rm)


def e_step(o, out, policy, rm, prompts, folder):
    """π_{t−1}, r → π_t: a folder, or None if no checkpoint beats π_{t−1} with a win rate of at least τ."""
    samples = scored_samples(o, out, policy, rm, prompts, o.samples, folder / "samples.jsonl")
    pairs = make_pairs(out, samples, folder / "pairs.jsonl")
    if not exists(folder / "selection.json"):
        checkpoints = train_policy(o, out, policy, pairs, folder / "checkpoints")
        select(o, out, policy, rm, checkpoints, folder)
    choice = json.loads((folder / "selection.json").read_text())
    if rank() == 0 and (folder / "checkpoints").exists():  # the losers go
        if choice["chosen"] and not (folder / "policy").exists():
            os.replace(folder / "checkpoints" / choice["chosen"], folder / "policy")
        run.remove(folder / "checkpoints")
    parallel.barrier()
    return str(folder / "policy") if choice["chosen"] else None


def m_step(o, out, old_policy, new_policy, rm, prompts, folder):
    """π_{t−1}, π_t, r → r': a folder. Training starts from the base RM each time."""
    folder, ranked = folder / "m", folder / "e1" / "pairs.jsonl"
    new = scored_samples(o, out, new_policy, rm, prompts, 1, folder / "new.jsonl")
    old = scored_samples(o, out, old_policy, rm, prompts, 1, folder / "old.jsonl")
    comparisons = make_comparisons(o, out, new, old, folder / "comparisons.jsonl")
    preferences = mix(comparisons, ranked, new_policy, old_policy, folder / "preferences.jsonl")
    if not exists(folder / "rm"):
        if not read_jsonl(preferences):
            raise Problem(f"{preferences}: every comparison was dropped and there are no ranked pairs")
        with writing(folder / "rm") as temporary:
            reward.train(o.rm, read_jsonl(preferences), temporary, lr=o.rm_lr, batch=o.rm_batch, seed=o.seed,
                         micro_batch=o.micro_batch, max_length=o.max_length, recompute=o.recompute,
                         log=Log(out / "metrics.jsonl", name(out, folder / "rm")))
    return str(folder / "rm")


# ---------------------------------------------------------------- phases: from files to files
def name(out, path):
    """A phase's name: its result's path in the run folder.
    It is part of the phase's seed and of its log lines."""
    return str(Path(path).relative_to(out).with_suffix(""))


def split(o, out):
    """Shuffle the prompts once; D_MS first, the rest in three equal subsets. Returns the subsets' files."""
    files = [out / "prompts" / f"{part}.jsonl" for part in ("s0", "s1", "s2")]
    if not exists(files[2]):
        prompts, repeats = read_prompts(o.prompts)
        third = (len(prompts) - o.select_prompts) // 3
        if third < 1:
            raise Problem(f"{o.prompts}: {len(prompts)} different prompts; "
                          f"--select_prompts {o.select_prompts} and three subsets "
                          f"need at least {o.select_prompts + 3}")
        for model in (o.policy, o.rm):
            encode_prompts(model, prompts)  # a prompt that is too long is said now, not hours later
        order = np.random.default_rng(o.seed).permutation(len(prompts))
        shuffled = [{"prompt": prompts[i]} for i in order]
        say(f"{len(prompts)} prompts ({repeats} repeated ones left out): "
            f"{o.select_prompts} for model selection, three subsets of {third}")
        if rank() == 0:
            write_jsonl(out / "prompts" / "select.jsonl", shuffled[:o.select_prompts])
            for i, file in enumerate(files):
                write_jsonl(file, shuffled[o.select_prompts + i * third:o.select_prompts + (i + 1) * third])
        parallel.barrier()
    return files


def scored_samples(o, out, policy, rm, prompts, samples, path):
    """Responses of `policy` to every prompt of a file, scored by `rm`."""
    texts = [row["prompt"] for row in read_jsonl(prompts)]
    rows = sample_and_score(o, policy, rm, texts, samples, f"{o.seed}/{name(out, path)}", path)
    mean = means(rows, "score", "tokens", "finished")
    say(f"{name(out, path)}: {len(rows)} responses, reward {mean['score']:.3f}, {mean['tokens']:.1f} tokens, "
        f"{mean['finished']:.1%} finished")
    return path


def means(rows, *keys):
    return {key: float(np.mean([row[key] for row in rows])) for key in keys}


def make_pairs(out, samples, path):
    if not exists(path):
        rows = read_jsonl(samples)
        pairs, without = preference_pairs(rows)
        if not pairs:
            raise Problem(f"{samples}: not one prompt gives a preference pair: "
                          "all rewards or texts are equal")
        Log(out / "metrics.jsonl", name(out, path))(
            prompts_without_pair=without, **means(rows, "score", "tokens", "finished"),
            **means(pairs, "chosen_score", "rejected_score", "chosen_tokens", "rejected_tokens"))
        if rank() == 0:
            write_jsonl(path, pairs)
        say(f"{len(pairs)} pairs, {without} prompts give none. The first:")
        show(pairs[0], "chosen", "rejected")
        parallel.barrier()
    return path


def train_policy(o, out, policy, pairs, path):
    """DPO; returns the checkpoints, in order of steps."""
    if not exists(path):
        with writing(path) as temporary:
            dpo.train(policy, read_jsonl(pairs), temporary, beta=o.beta, lr=o.policy_lr, batch=o.policy_batch,
                      seed=o.seed, micro_batch=o.micro_batch, max_length=o.max_length, recompute=o.recompute,
                      save_every=o.save_every if o.select else 0,
                      log=Log(out / "metrics.jsonl", name(out, path)))
    return sorted(path.iterdir(), key=lambda p: int(p.name.removeprefix("step-")))


def select(o, out, policy, rm, checkpoints, folder):
    """Model selection on D_MS: win rate of each checkpoint against π_{t−1} under the current RM."""
    win_rates, chosen = {}, checkpoints[-1].name
    if o.select:
        prompts = out / "prompts" / "select.jsonl"
        files = [scored_samples(o, out, p, rm, prompts, 1, folder / "select" / f"{n}.jsonl")
                 for n, p in [("before", policy), *((c.name, c) for c in checkpoints)]]
        scores = [[row["score"] for row in read_jsonl(file)] for file in files]
        win_rates = {c.name: win_rate(after, scores[0]) for c, after in zip(checkpoints, scores[1:])}
        best = max(win_rates, key=win_rates.get)
        chosen = best if win_rates[best] >= o.tau else None
        for step, rate in win_rates.items():
            say(f"{name(out, folder)} {step}: win rate {rate:.3f}{' chosen' if step == chosen else ''}")
        if not chosen:
            say(f"no checkpoint reaches a win rate of {o.tau}: {policy} stays and the run stops")
    log = Log(out / "metrics.jsonl", name(out, folder / "selection"))
    for step, rate in win_rates.items():
        log(checkpoint=step, win_rate=rate, chosen=step == chosen)
    write_json(folder / "selection.json", {"chosen": chosen, "win_rates": win_rates, "tau": o.tau,
                                           "policy_before": str(policy), "rm": str(rm)})


def make_comparisons(o, out, new, old, path):
    if not exists(path):
        rows = compare(read_jsonl(new), read_jsonl(old), o.filter)
        Log(out / "metrics.jsonl", name(out, path))(
            comparisons=len(rows), epsilon=rows[0]["epsilon"],
            **means(rows, "kept", "margin", "new_score", "old_score", "new_tokens", "old_tokens"))
        if rank() == 0:
            write_jsonl(path, rows)
        reasons = [row["reason"] for row in rows]
        say(f"{sum(row['kept'] for row in rows)} of {len(rows)} comparisons kept, "
            f"epsilon {rows[0]['epsilon']:.4f}: "
            + ", ".join(f"{reasons.count(r)} {r}" for r in sorted(set(reasons))) + ". The first:")
        show(rows[0], "new", "old")
        parallel.barrier()
    return path


def mix(comparisons, ranked, new_policy, old_policy, path):
    """What the RM trains on: the kept comparisons and the RM-ranked pairs of the E-step just before,
    all of both."""
    if not exists(path):
        rows = [dict(prompt=row["prompt"], chosen=row["new"], rejected=row["old"], source=str(comparisons),
                     chosen_policy=new_policy, rejected_policy=old_policy)
                for row in read_jsonl(comparisons) if row["kept"]]
        rows += [dict(prompt=row["prompt"], chosen=row["chosen"], rejected=row["rejected"],
                      source=str(ranked), chosen_policy=old_policy, rejected_policy=old_policy)
                 for row in read_jsonl(ranked)]
        if rank() == 0:
            write_jsonl(path, rows)
        parallel.barrier()
    return path


def show(row, *sides):
    for key in ("prompt", *sides):
        score = f" [{row[f'{key}_score']:.3f}]" if key in sides else ""
        say(f"  {key}{score}: {str(row[key])[:300]!r}")


def link(out, policy, rm):
    """OUT/policy and OUT/rm always are the run's last models."""
    if rank() == 0:
        for at, target in ((out / "policy", policy), (out / "rm", rm)):
            inside = Path(target).resolve().is_relative_to(out.resolve())
            temporary = at.with_name(f".{at.name}.tmp")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(target, out) if inside else Path(target).resolve())
            os.replace(temporary, at)
    parallel.barrier()


def main():
    embedded = not any(word.split("=")[0] == "--policy" for word in sys.argv[1:])
    o = run.parse(Options, **(toy.SETTINGS if embedded else {}))
    out = Path(o.out)
    if embedded:
        if o.rm or o.prompts:
            raise Problem("--rm and --prompts need --policy")
        say("no --policy: running the embedded task (toy.py)")
        o = replace(o, **toy.build(o.seed))
    elif not (o.rm and o.prompts):
        raise Problem("--policy needs --rm and --prompts")
    if o.samples < 2:
        raise Problem("--samples 1 makes no pairs; at least 2 are needed")
    if o.select and not o.select_prompts:
        raise Problem("--select_prompts 0 needs --select false")
    o = replace(o, policy=local_folder(o.policy), rm=local_folder(o.rm))
    templates = {side: load_tokenizer(getattr(o, side)).chat_template for side in ("policy", "rm")}
    models.check_reward(o.rm)
    run.claim(out, o, templates=templates)
    mutual_taught(o, out)
    if embedded:
        gold.measure(out, o)
    report(out)


if __name__ == "__main__":
    launch(main)

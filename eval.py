"""Look at models and runs.

    python eval.py winrate --policy runs/mt/policy --baseline MODEL --rm RM \\
        --prompts prompts.jsonl --out runs/winrate
    python eval.py accuracy --rm RM --pairs pairs.jsonl
    python eval.py report runs/mt

winrate: a response of each policy to every prompt, judged by a reward model. accuracy: of a reward model on
labelled pairs. report: the table of a run, and its picture (report.png) where matplotlib is installed.
`import eval` hides a builtin: write `from eval import …`.
"""
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import reward
from data import Problem, read_jsonl, read_pairs, read_prompts
from parallel import claim, exists, launch, local_folder, parse, parts_of, rank, remove, say
from sampler import sample


def win_rate(new_scores, old_scores):
    """Share of prompts on which the new score is higher; a tie counts half. (N,), (N,) -> [0, 1]."""
    new, old = np.asarray(new_scores, float), np.asarray(old_scores, float)
    return float(((new > old) + 0.5 * (new == old)).mean())


def standard_error(values):
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


# ---------------------------------------------------------------- winrate
@dataclass
class WinRate:
    policy: str = field(metadata={"help": "folder or hub id"})
    baseline: str = field(metadata={"help": "folder or hub id"})
    rm: str = field(metadata={"help": "the judge: folder or hub id"})
    prompts: str = field(metadata={"help": "JSONL, JSON, parquet or hub id with a field `prompt`"})
    out: str = field(metadata={"help": "folder for the scored responses"})
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 1024
    seed: int = 0
    sample_batch: int = 64
    score_batch: int = 8


def winrate(o):
    prompts, _ = read_prompts(o.prompts)
    judge, out = local_folder(o.rm), Path(o.out)
    claim(out, o)
    scored = {side: sample_and_score(o, local_folder(policy), judge, prompts, 1, f"{o.seed}/{side}",
                                     out / f"{side}.jsonl")
              for side, policy in (("policy", o.policy), ("baseline", o.baseline))}
    rewards = {side: [row["score"] for row in rows] for side, rows in scored.items()}
    say(f"{len(prompts)} prompts, win rate {win_rate(rewards['policy'], rewards['baseline']):.4f}")
    for side, rows in scored.items():
        say(f"{side:9} reward {np.mean(rewards[side]):8.4f} ± {standard_error(rewards[side]):.4f}, "
            f"{np.mean([row['tokens'] for row in rows]):.1f} tokens, "
            f"{np.mean([row['finished'] for row in rows]):.1%} finished")


def sample_and_score(o, policy, rm, prompts, samples, seed, path):
    """`samples` responses of `policy` to every prompt, scored by `rm`, in the file `path`; returns its rows.

    o: options with temperature, top_p, max_new_tokens, sample_batch and score_batch.
    """
    raw = path.with_name(f"{path.stem}.unscored.jsonl")
    if not exists(path):
        if not exists(raw):
            sample(policy, prompts, raw, samples=samples, temperature=o.temperature, top_p=o.top_p,
                   max_new_tokens=o.max_new_tokens, batch=o.sample_batch, seed=seed)
        reward.score(rm, read_jsonl(raw), path, o.score_batch)
    if rank() == 0:
        for leftover in (raw, parts_of(raw), parts_of(path)):
            remove(leftover)
    return read_jsonl(path)


# ---------------------------------------------------------------- accuracy
@dataclass
class Accuracy:
    rm: str = field(metadata={"help": "folder or hub id"})
    pairs: str = field(metadata={"help": "preference pairs: prompt, chosen, rejected"})
    score_batch: int = 8


def accuracy(o):
    pairs = read_pairs(o.pairs)
    say(f"accuracy {reward.accuracy(local_folder(o.rm), pairs, o.score_batch):.4f} on {len(pairs)} pairs")


# ---------------------------------------------------------------- report
def steps_of(run):
    """The E- and M-steps of a run, in order: dicts for the table and the picture."""
    steps = []
    for folder in sorted(Path(run).glob("round*"), key=lambda path: int(path.name.removeprefix("round"))):
        for part in ("e1", "m", "e2"):
            phase = f"{folder.name}/{part}"
            if (folder / part / "selection.json").exists():
                steps.append(_e_step(phase, folder / part))
            elif (folder / part / "rm").exists():
                steps.append(_m_step(phase, folder / part))
    return steps


def _e_step(phase, folder):
    samples = read_jsonl(folder / "samples.jsonl")
    choice = json.loads((folder / "selection.json").read_text())
    mean = {key: np.mean([row[key] for row in samples]) for key in ("score", "tokens", "finished")}
    return dict(phase=phase, kind="E", chosen=choice["chosen"],
                win_rate=max(choice["win_rates"].values(), default=None),
                pairs=len(read_jsonl(folder / "pairs.jsonl")), reward=mean["score"], tokens=mean["tokens"],
                finished=mean["finished"])


def _m_step(phase, folder):
    rows = read_jsonl(folder / "comparisons.jsonl")
    return dict(phase=phase, kind="M", kept=sum(row["kept"] for row in rows), comparisons=len(rows),
                margin=np.mean([row["margin"] for row in rows]), epsilon=rows[0]["epsilon"],
                tokens=np.mean([row["new_tokens"] for row in rows]))


def table(steps):
    """The steps as text. Reward and length are those of the E-step's samples, before its update."""
    lines = [f"{'step':12} {'sampled reward':>14} {'tokens':>7} {'finished':>8} "
             f"{'pairs':>11} {'win rate':>8}  outcome"]
    for s in steps:
        if s["kind"] == "E":
            rate = "-" if s["win_rate"] is None else f"{s['win_rate']:.3f}"
            outcome = "policy: " + s["chosen"] if s["chosen"] else "discarded, run stopped"
            lines.append(f"{s['phase']:12} {s['reward']:14.3f} {s['tokens']:7.1f} {s['finished']:8.1%} "
                         f"{s['pairs']:11} {rate:>8}  {outcome}")
        else:
            lines.append(f"{s['phase']:12} {'':14} {s['tokens']:7.1f} {'':8} "
                         f"{s['kept']:5}/{s['comparisons']:<5} {'':8}  "
                         f"reward model; margin {s['margin']:+.3f}, epsilon {s['epsilon']:.3f}")
    return "\n".join(lines)


@dataclass
class Report:
    runs: list[str] = field(metadata={"help": "run folders"})


def report(run):
    """Print the table of a run; draw run/report.png."""
    run = Path(run)
    if not (run / "run.json").exists():
        raise Problem(f"{run}: not a run folder (no run.json)")
    if rank() > 0:
        return
    steps, gold = steps_of(run), read_jsonl(run / "gold.jsonl") if (run / "gold.jsonl").exists() else []
    say("\n" + table(steps))
    if gold:
        import toy
        say("\n" + toy.table(gold))
    try:
        import matplotlib
    except ImportError:
        return say("\nno picture: pip install matplotlib")
    matplotlib.use("Agg")
    draw(steps, gold, run / "report.png")
    say(f"\npicture: {run / 'report.png'}")


def draw(steps, gold, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    e, m = [s for s in steps if s["kind"] == "E"], [s for s in steps if s["kind"] == "M"]
    rates = [s for s in e if s["win_rate"] is not None]
    axes[0].bar([s["phase"] for s in rates], [s["win_rate"] for s in rates],
                color=["tab:blue" if s["chosen"] else "tab:gray" for s in rates])
    axes[0].axhline(0.5, color="black", linewidth=0.8)
    axes[0].set(title="best win rate on D_MS (grey: discarded)", ylim=(0, 1))
    if gold:
        at = range(len(gold))
        axes[1].errorbar(at, [g["gold"] for g in gold], [g["gold_se"] for g in gold],
                         marker="o", label="gold")
        axes[1].plot(at, [g["reward_r0"] for g in gold], marker="s", label="reward by r0")
        axes[1].set_xticks(at, [g["policy"] for g in gold])
        axes[1].legend()
        axes[1].set(title="test prompts: gold and reward of each policy")
        axes[2].plot(at, [g["accuracy_base"] for g in gold], marker="o", label="on base policy's answers")
        axes[2].plot(at, [g["accuracy_current"] for g in gold], marker="s", label="on this policy's answers")
        axes[2].set_xticks(at, [f"{g['policy']}\n{g['rm']}" for g in gold])
        axes[2].legend()
        axes[2].set(title="accuracy of the reward model in use")
    else:
        axes[1].plot([s["phase"] for s in e], [s["reward"] for s in e], marker="o")
        axes[1].set(title="mean reward of the E-step's samples")
        axes[2].bar([s["phase"] for s in m], [s["kept"] / s["comparisons"] for s in m])
        axes[2].set(title="share of comparisons kept", ylim=(0, 1))
    for axis in axes:
        axis.tick_params(axis="x", labelsize=7, rotation=30 if not gold else 0)
    figure.savefig(path, dpi=110)


COMMANDS = {"winrate": (WinRate, winrate), "accuracy": (Accuracy, accuracy),
            "report": (Report, lambda o: [report(run) for run in o.runs])}


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

"""Arena-Hard v0.1: write a policy's answers for an external judge, and compute the score from its verdicts.

    python eval.py arena-generate --policy runs/mt/policy --prompts question.jsonl
    python eval.py arena --judgments MODEL.jsonl

arena-generate writes NAME.jsonl for the official tool, which asks the judge. Questions have `question_id` and
`turns` or, since 2025, `uid` and `prompt`, and the answers are written in the format that belongs to them.
arena reads the tool's judgments of one model and prints the model's score against the baseline in percent.

Left out on purpose: asking a judge (it needs a network and a key), style control, version 2.
"""
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data import check_prompt, read_rows, seed_of
from common.parallel import Problem, say
from common.run import option, write_rows
from evals.alpaca import AlpacaGenerate, answer, name_of
from evals.stats import JSON, bootstrap, existing, publish

# where the files are published
QUESTIONS = "github.com/lmarena/arena-hard-auto: data/arena-hard-v0.1/question.jsonl"
JUDGMENTS = "huggingface.co/spaces/lmarena-ai/arena-hard-browser: data/arena-hard-v0.1/model_judgment"

GAMES = {"A>>B": (3, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}  # A's wins, games

# ---------------------------------------------------------------- figures, from verdicts
def tally(first, second):
    """Return (games won by the model, games played) for a question's two verdicts. A is the baseline in the
    first and the model in the second. A strong verdict counts as three games, a missing one as none."""
    lost, played = GAMES.get(first, (0, 0))
    won, more = GAMES.get(second, (0, 0))
    return won + played - lost, played + more

def arena_figures(verdicts):
    """Return the score against the baseline in percent (arXiv 2406.11939). verdicts: a pair (first game's,
    second game's) for each question.

    All games are against one baseline, so the Bradley-Terry likelihood is Π σ(θ)^won (1 − σ(θ))^lost. It is
    largest where σ(θ) is the share of games won, so nothing needs to be fitted. The official tool draws the
    bootstrap samples from games. Here they are drawn from questions, because the games of one question are
    not independent.
    """
    games = np.array([tally(*pair) for pair in verdicts], float)  # (Q, 2) won, played
    games = games[games[:, 1] > 0]
    low, high = bootstrap(lambda i: 100 * np.divide(*games[i].sum(0)), len(games))
    return dict(score=float(100 * np.divide(*games.sum(0))), ci_low=low, ci_high=high, n_questions=len(games),
                n_games=int(games[:, 1].sum()), n_no_verdict=sum(v not in GAMES for p in verdicts for v in p))

# ---------------------------------------------------------------- commands
@dataclass
class ArenaGenerate(AlpacaGenerate):
    prompts: str = option(help="Arena-Hard v0.1's question.jsonl")
    out: str = option("runs/arena", "folder for the answers, NAME.jsonl")
    max_new_tokens: int = 4096

def arena_generate(o):
    if not re.fullmatch(r"[^./\\][^/\\]*", o.name or name_of(o.policy)):
        raise Problem(f"--name {o.name!r}: a plain name is needed, because it names the file of answers")
    rows = read_rows(existing(o.prompts, QUESTIONS))
    try:
        new = "uid" in rows[0][1]
        ids = [row["uid" if new else "question_id"] for _, row in rows]
        prompts = [check_prompt(where, row["prompt"] if new else row["turns"][0]["content"])
                   for where, row in rows]
    except (KeyError, TypeError, IndexError) as error:
        raise Problem(f"{o.prompts}: not Arena-Hard's questions ({error!r})") from None
    name, answers = answer(o, prompts)
    path = Path(o.out) / f"{name}.jsonl"
    form = new_answer if new else old_answer
    write_rows(path, [form(name, id, reply) for id, reply in zip(ids, answers)])
    say(f"{path}: {len(answers)} answers, by {'uid' if new else 'question_id'} like the questions")

def old_answer(name, id, reply):
    """Return an answer in the format that the official tool read until 2025."""
    return dict(question_id=id, answer_id=f"{seed_of(name, id):016x}", model_id=name, tstamp=time.time(),
                choices=[dict(index=0, turns=[dict(content=reply["response"], token_len=reply["tokens"])])])

def new_answer(name, id, reply):
    """Return an answer in the format that it has read since."""
    return dict(uid=id, ans_id=f"{seed_of(name, id):016x}", model=name, tstamp=time.time(), metadata={
        "token_len": reply["tokens"]}, messages=[
            dict(role="user", content=reply["prompt"]),
            dict(role="assistant", content=dict(answer=reply["response"]))])

@dataclass
class Arena:
    judgments: str = option(help="JSONL of one model: for each question two `games`, each with a `score`")
    json: str = option("", JSON)

def arena(o):
    rows = read_rows(existing(o.judgments, JUDGMENTS))
    try:
        verdicts = [[game and game["score"] for game in row["games"]] for _, row in rows]
        models = {row["model"] for _, row in rows}
        given = sum(verdict in GAMES for pair in verdicts for verdict in pair)
    except (KeyError, TypeError) as error:
        raise Problem(f"{o.judgments}: not Arena-Hard's judgments ({error!r})") from None
    if len(models) > 1 or {len(pair) for pair in verdicts} != {2}:
        raise Problem(f"{o.judgments}: two games per question are needed, and rows that are all of one model")
    if not given:
        raise Problem(f"{o.judgments}: no verdict in any game; a `score` is one of {', '.join(GAMES)}")
    say(f"{models.pop()} against the baseline")
    publish(arena_figures(verdicts), o.json)

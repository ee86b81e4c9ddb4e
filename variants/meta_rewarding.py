"""Meta-Rewarding (arXiv 2407.19594): Self-Rewarding, and the policy judges its judgements as well.

    torchrun -m variants.meta_rewarding --rounds 2

Of each prompt's responses it takes the one whose scores vary most. All different judgements of it meet in
twos, in both orders; a verdict that changes with the order is dropped. The judgement with the most net wins
is chosen, the one with the fewest rejected; DPO trains on these pairs and on those of responses together. The
paper rates judgements by Elo, weighs verdicts by place without dropping any, and leaves out long winners.
"""
from itertools import permutations

import numpy as np

import filter
import mt
from common import run, toy
from common.data import by_prompt, read_jsonl
from variants import self_rewarding, toy_judge
from variants.self_rewarding import SCORE, ask, question, readable

META_JUDGE = """Two judges were given the task between the lines.
----------
{task}
----------
<judgement number="1">
{first}
</judgement>
<judgement number="2">
{second}
</judgement>
Which is the better judgement: whose score follows the task's rules, whose reasons are true of the response?
The order means nothing. Give reasons in at most 100 words. End with a line that names the better one:
Winner: N"""
WINNER = r"\bwinner[\s*:]*([12])[\s*.]*$"

def rivals_of(group, judgements):
    """A prompt's samples -> the different judgements of the one whose scores vary most."""
    most = max((judgements[question(row)] for row in group),
               key=lambda some: np.var([judgement["score"] for judgement in some] or [0]))
    return list({judgement["response"]: judgement for judgement in most}.values())

def contest(rivals, verdicts):
    """n judgements, and (n, n): 1 where the row's, standing first, was called better than the column's, −1
    where worse, 0 where nothing can be read -> (a pair or None, comparisons decided)."""
    wins = np.trunc((verdicts - verdicts.T) / 2)  # 1 and −1 where both orders agree, else 0
    net, decided = wins.sum(1), int((wins > 0).sum())
    best, worst = int(net.argmax()), int(net.argmin())
    reason = f"net wins {net[best]:.0f} and {net[worst]:.0f}"
    return filter.pair_of(rivals, best, worst, reason) if net.any() else None, decided

def meta_question(first, second):
    return META_JUDGE.format(task=first["prompt"], first=first["response"], second=second["response"])

@run.phase
def meta_judge(o, policy, samples, judgements, path):
    """Pairs of judgements, at most one for each prompt."""
    scored = readable(judgements, SCORE)
    groups = [rivals_of(group, scored) for group in by_prompt(read_jsonl(samples))]
    questions = [meta_question(*two) for rivals in groups for two in permutations(rivals, 2)]
    answers = readable(ask(o, policy, judgements, path.with_name("battles.jsonl"),
                           questions=questions, count=1), WINNER)
    contests = [contest(rivals, np.array([[  # the first place wins: 1, the second: -1
        sum(3 - 2 * answer["score"] for answer in answers[meta_question(first, second)])
        for second in rivals] for first in rivals])) for rivals in groups if rivals]
    pairs, met = [pair for pair, _ in contests if pair], len(questions) // 2
    undecided = met - sum(decided for _, decided in contests)
    run.log_of(o, path)(judgement_pairs=len(pairs), comparisons=met, undecided=undecided)
    run.write_rows(path, pairs)
    return f"{len(pairs)} pairs of judgements; {undecided} of {met} comparisons undecided"

@run.phase
def join(o, pairs, judged, path):
    run.write_rows(path, read_jsonl(pairs) + read_jsonl(judged))

def train_policy(o, policy, pairs, path, dpo_on=mt.train_policy):
    judged = meta_judge(o, policy, path.with_name("samples.jsonl"), path.with_name("judgements.jsonl"),
                        path.with_name("disputes.jsonl"))
    return dpo_on(o, policy, join(o, pairs, judged, path.with_name("mixed.jsonl")), path)

def build(seed):
    global META_JUDGE
    META_JUDGE = toy_judge.META_JUDGE
    return self_rewarding.build(seed)

if __name__ == "__main__":
    toy.build, mt.make_pairs, mt.train_policy = build, self_rewarding.make_pairs, train_policy
    filter.choose_pair = self_rewarding.choose_pair
    run.launch(mt.main, update_rm=False, tau=0.0)

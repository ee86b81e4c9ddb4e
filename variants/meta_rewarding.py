"""Meta-Rewarding (arXiv 2407.19594): Self-Rewarding, and the policy also learns to judge.

    torchrun -m variants.meta_rewarding --rounds 2

As in self_rewarding.py the policy judges its responses, in the place of Mutual-Taught's reward model. Here it
judges its judgements as well. Of a prompt's responses the one is taken whose scores vary most. Every two of
its different judgements are compared in both orders; a verdict that changes with the order is dropped. The
judgement with the most net wins (wins minus losses) is chosen, the one with the fewest is rejected. DPO
trains on these pairs together with the pairs of responses.

Different from the source: the paper rates judgements by Elo, weights verdicts by place without dropping any,
and leaves out winners that are too long.
"""
from itertools import permutations

import numpy as np

import filter
import mt
from common import run, toy
from common.data import by_prompt, read_jsonl
from variants import self_rewarding, toy_judge
from variants.self_rewarding import SCORE, ask, numbered_answers, question

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

def most_disputed_judgements(group, judgements):
    """A prompt's samples -> the different judgements of the sample whose scores vary most."""
    most = max((judgements[question(row)] for row in group),
               key=lambda some: np.var([judgement["score"] for judgement in some] or [0]))
    return list({judgement["response"]: judgement for judgement in most}.values())

def pair_from_verdicts(rivals, verdicts):
    """n judgements and verdicts (n, n) -> (a pair or None, how many comparisons were decided).
    verdicts[i, j], with judgement i in the first place and j in the second: 1 if i was called better, −1 if j
    was, 0 if the verdict can't be read."""
    wins = np.trunc((verdicts - verdicts.T) / 2)  # 1 and −1 where both orders agree, else 0
    net, decided = wins.sum(1), int((wins > 0).sum())
    best, worst = int(net.argmax()), int(net.argmin())
    reason = f"net wins {net[best]:.0f} and {net[worst]:.0f}"
    return filter.pair_of(rivals, best, worst, reason) if net.any() else None, decided

def meta_question(first, second):
    return META_JUDGE.format(task=first["prompt"], first=first["response"], second=second["response"])

@run.phase
def meta_judge(o, policy, samples, judgements, path):
    """Write pairs of judgements, at most one for each prompt."""
    scored = numbered_answers(judgements, SCORE)
    groups = [most_disputed_judgements(group, scored) for group in by_prompt(read_jsonl(samples))]
    questions = [meta_question(*two) for rivals in groups for two in permutations(rivals, 2)]
    answers = numbered_answers(ask(o, policy, judgements, path.with_name("battles.jsonl"),
                                   questions=questions, count=1), WINNER)
    contests = [pair_from_verdicts(rivals, np.array([[  # Winner 1 -> 1, Winner 2 -> −1
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

def train_policy(o, policy, pairs, path, original=mt.train_policy):
    judged = meta_judge(o, policy, path.with_name("samples.jsonl"), path.with_name("judgements.jsonl"),
                        path.with_name("disputes.jsonl"))
    return original(o, policy, join(o, pairs, judged, path.with_name("mixed.jsonl")), path)

def build(seed):
    global META_JUDGE
    META_JUDGE = toy_judge.META_JUDGE
    return self_rewarding.build(seed)

if __name__ == "__main__":
    toy.build, mt.make_pairs, mt.train_policy = build, self_rewarding.make_pairs, train_policy
    filter.choose_pair = self_rewarding.choose_pair
    run.launch(mt.main, update_rm=False, tau=0.0)

"""Self-Rewarding (arXiv 2401.10020): the policy judges its own responses, in words.

    torchrun -m variants.self_rewarding --rounds 2

In Mutual-Taught the reward model ranks the responses. Here the policy is asked J times to give each of them 0
to 5 points. Judgements are sampled as responses are, and a response's score s is the mean of its points. The
shortest response with s ≥ (1 − ρ) S_max + ρ S_min is chosen, S_max and S_min being the highest and the lowest
score of the prompt's responses. The one with the lowest score is rejected. The reward model only measures: it
scores responses for the record and selects checkpoints, as Claude 2 does in the paper. There is no M-step and
τ is 0. The embedded task's policy judges in a language of its own (toy_judge.py).

Different from the source: there the highest score is chosen (ρ = 0), J is 3, and the policy writes new
prompts, too. J = 11 and the choice of a short response, which keeps lengths from growing, are those of
Meta-Rewarding (arXiv 2407.19594). ρ = ½ is ours, since it comes nearest to mt.py's rule.
"""
import re
from collections import defaultdict

import numpy as np

import filter
import mt
from common import models, run, toy
from common.data import as_messages, by_prompt, encode_chat, load_tokenizer, read_jsonl
from sampler import sample
from variants import toy_judge

JUDGEMENTS, RHO = 11, 0.5
JUDGE = """Judge how well a response answers a prompt. Give a point for each of these that is true:
1. It is about what was asked and says something useful, even if much is missing.
2. It deals with most of what was asked.
3. It settles the main part, so that whoever asked is helped.
4. It is complete, clear and well ordered, and speaks to whoever asked.
5. It could not be better: an expert wrote it for this prompt, and no sentence is too many.
<prompt>
{prompt}
</prompt>
<response>
{response}
</response>
Give reasons in at most 100 words. End with a line that has the sum of the points, a whole number from 0 to 5:
Score: N"""
SCORE = r"\bscore[\s*:]*([0-5])(?:/5)?[\s*.]*$"

def choose_pair(scores, lengths):
    """Takes the place of filter.choose_pair. Of equally short responses the higher score is chosen."""
    scores, lengths = np.asarray(scores, float), np.asarray(lengths)
    if scores.max() == scores.min():
        return None
    bar = scores.max() - RHO * (scores.max() - scores.min())
    best = np.flatnonzero(scores >= bar)
    chosen = min(best, key=lambda i: (lengths[i], -scores[i], i))
    return int(chosen), int(scores.argmin()), f"chosen: shortest from {bar:.4f} upwards; rejected: lowest"

def number_at_end(answer, pattern):
    """The number that an answer ends with, or None. No number is guessed; a cut-off answer has none."""
    found = answer["finished"] and re.search(pattern, answer["response"], re.IGNORECASE)
    return int(found[1]) if found else None

def question(row):
    """The question that asks for a judgement of a sample; earlier turns are shown with their roles."""
    *before, last = as_messages(row["prompt"])
    turns = [f"{message['role']}: {message['content']}" for message in before] + [last["content"]]
    return JUDGE.format(prompt="\n\n".join(turns), response=row["response"])

@run.phase
def ask(o, policy, made_from, path, questions, count):
    """Sample `count` answers to each question that is short enough for the policy's context."""
    tokenizer, context = load_tokenizer(policy), models.context_of(policy)
    short = [q for q in dict.fromkeys(questions) if len(encode_chat(tokenizer, q)) < context]
    sample(policy, short, path, samples=count, temperature=o.temperature, top_p=o.top_p,
           max_new_tokens=o.max_new_tokens, rows=o.sample_batch, seed=f"{o.seed}/{run.name_of(o, path)}")

def numbered_answers(path, pattern):
    """{question: those of its answers that end with a number, which becomes their `score`}"""
    answers = defaultdict(list)
    for row in read_jsonl(path):
        number = number_at_end(row, pattern)
        answers[row["prompt"]] += [] if number is None else [row | {"score": number}]
    return answers

@run.phase
def judge(o, samples, path):
    """Write the samples with the mean of their judgements as `score`. A prompt is left out if one of its
    responses has no judgement that can be read."""
    rows, judged = read_jsonl(samples), []
    judgements = numbered_answers(ask(o, rows[0]["policy"], samples, path.with_name("judgements.jsonl"),
                                      questions=map(question, rows), count=JUDGEMENTS), SCORE)
    for group in by_prompt(rows):
        scores = [[answer["score"] for answer in judgements[question(row)]] for row in group]
        if all(scores):
            judged += [row | {"score": float(np.mean(some)), "rm": row["policy"]}
                       for row, some in zip(group, scores)]
    asked, left_out = JUDGEMENTS * len(judgements), (len(rows) - len(judged)) // o.samples
    unreadable = asked - sum(map(len, judgements.values()))
    run.log_of(o, path)(judgements=asked, unreadable=unreadable, prompts_left_out=left_out)
    run.write_rows(path, judged)
    return f"{unreadable} of {asked} judgements can't be read; {left_out} prompts left out"

def make_pairs(o, samples, path, original=mt.make_pairs):
    return original(o, judge(o, samples, path.with_name("judged.jsonl")), path)

def build(seed, original=toy.build):
    global JUDGE
    JUDGE = toy_judge.JUDGE
    return original(seed, toy_judge.__file__)

if __name__ == "__main__":
    toy.build, filter.choose_pair, mt.make_pairs = build, choose_pair, make_pairs
    run.launch(mt.main, update_rm=False, tau=0.0)

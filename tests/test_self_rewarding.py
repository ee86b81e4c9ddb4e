"""pytest tests/test_self_rewarding.py

Self- and Meta-Rewarding: small cases, worked out by hand, of what is chosen, what can be read and what is
dropped. Then both commands run tiny, with a policy that has learnt to answer their questions.
"""
import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import FEW, ROOT

from common import toy
from common.data import by_prompt, read_jsonl
from variants import meta_rewarding, self_rewarding, toy_judge

@pytest.mark.parametrize("scores, lengths, rho, pair", [
    ([5, 4, 1], [9, 5, 1], 0.25, (1, 2)),      # 4 ≥ .75 · 5 + .25 · 1: the shorter of the two above
    ([5, 3.9, 1], [9, 5, 1], 0.25, (0, 2)),    # 3.9 is just below
    ([5, 4, 1], [9, 5, 1], 0, (0, 2)),         # ρ = 0: the highest
    ([5, 5, 1, 1], [9, 9, 7, 3], 0, (0, 2)),   # ties: the earlier, on both sides
    ([4, 5, 1], [6, 6, 2], 0.25, (1, 2)),      # equally short: the higher
    ([3, 3, 3], [1, 2, 3], 0.25, None),
])
def test_the_shortest_response_near_the_highest_score_is_chosen_and_the_lowest_rejected(
        scores, lengths, rho, pair, monkeypatch):
    monkeypatch.setattr(self_rewarding, "RHO", rho)
    choice = self_rewarding.choose_pair(scores, lengths)
    assert (choice and choice[:2]) == pair

@pytest.mark.parametrize("text, number", [
    ("It says what was asked.\nScore: 4", 4), ("score 0", 0), ("**Score: 3**", 3), ("Final score: 2/5.", 2),
    ("Score: 1 for the start, but\nScore: 5 ", 5),                   # the last number counts
    ("Score: 6", None), ("Score: 10", None), ("Score: 4.5", None), ("Score: 4/10", None), ("Score: -3", None),
    ("Score: N", None), ("Score: 4 or 5", None), ("4", None), ("underscore: 4", None), ("Score: ٣", None),
    ("Score: 4\nThat is my judgement.", None), ("The first counts wrongly.\nWinner: 2", 2), ("winner 1", 1),
    ("Winner: 3", None), ("Winner: 12", None), ("Winner: 1 and 2", None), ("Winner: both", None),
])
def test_a_judgement_ends_with_its_number_or_has_none(text, number):
    pattern = meta_rewarding.WINNER if "inner" in text else self_rewarding.SCORE
    assert self_rewarding.number_at_end(dict(response=text, finished=True), pattern) == number
    assert self_rewarding.number_at_end(dict(response=text, finished=False), pattern) is None

def judgement(text, score):
    return dict(prompt="judge", response=text, score=score, tokens=2, finished=True)

def test_a_verdict_that_changes_with_the_order_decides_nothing():
    a, b, c = rivals = [judgement("a", 1), judgement("b", 3), judgement("c", 5)]
    verdicts = np.array([[0, -1, 1],    # against b, a loses in both orders
                         [1, 0, 1],     # against c, b wins only where it stands first
                         [-1, 1, 0]])   # against a, c loses in both orders
    pair, decided = meta_rewarding.pair_from_verdicts(rivals, verdicts)
    assert decided == 2
    assert (pair["chosen"], pair["rejected"]) == ("b", "c")
    assert (pair["chosen_score"], pair["rejected_score"], pair["prompt"]) == (3, 5, "judge")
    one_unread = np.array([[0, 1], [0, 0]])
    always_the_first = np.array([[0, 1], [1, 0]])
    for nothing in one_unread, always_the_first:
        assert meta_rewarding.pair_from_verdicts([a, b], nothing) == (None, 0)
    in_a_circle = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    assert meta_rewarding.pair_from_verdicts(rivals, in_a_circle) == (None, 3)
    assert meta_rewarding.pair_from_verdicts([a], np.zeros((1, 1))) == (None, 0)

def test_the_different_judgements_of_the_most_disputed_response_are_compared():
    rows = [dict(prompt="p", response=text) for text in ("unread", "sure", "disputed")]
    unread, sure, disputed = map(self_rewarding.question, rows)
    judgements = {sure: [judgement("a", 3), judgement("b", 4)], unread: [],
                  disputed: [judgement("c", 1), judgement("d", 5), judgement("c", 1)]}
    assert [j["response"] for j in meta_rewarding.most_disputed_judgements(rows, judgements)] == ["c", "d"]

def test_a_question_holds_the_whole_conversation():
    chat = [dict(role="system", content="Be kind."), dict(role="user", content="Why?")]
    asked = self_rewarding.question(dict(prompt=chat, response="Be{cause}."))
    assert "<prompt>\nsystem: Be kind.\n\nWhy?\n</prompt>" in asked and "\nBe{cause}.\n" in asked
    assert "<prompt>\nWhy?\n</prompt>" in self_rewarding.question(dict(prompt="Why?", response=""))

def test_demonstrated_judgements_are_as_noisy_as_the_base_reward_models_labels():
    good = dict(prompt="two happy lines about the farm", tokens=10, finished=True,
                response="merry cows dance . jolly pigs sing . the end .")
    worse = good | {"response": good["response"].removesuffix(" the end .")}
    z = (toy.gold_of(good) - toy.gold_of(worse)) / toy.LABEL_NOISE
    assert z > 0.5
    pairs = list(toy_judge.demonstrations([good, worse] * 8000, random.Random(0)))
    scores = [int(answer.split()[1]) for question, answer in pairs if answer.startswith("score")]
    first, second = np.reshape(scores, (-1, 2)).T
    share = (first > second).mean() + (first == second).mean() / 2
    assert share == pytest.approx(1 / (1 + math.exp(-z)), abs=0.03)
    assert {*Counter(scores)} == set(range(6)) and max(Counter(scores).values()) < 1.1 * len(scores) / 6

@pytest.fixture(scope="module")
def judging(tmp_path_factory, prompts):
    """A policy like the embedded task's that answers the questions of both variants, at random. About one
    judgement in five can't be read."""
    rng, answers, folder = random.Random(0), [], tmp_path_factory.mktemp("judging")
    for _ in range(150):
        response = toy.demonstration(prompts[0], rng)
        task = self_rewarding.question(dict(prompt=rng.choice(prompts), response=response))
        first, second = (f"Score: {n}" for n in rng.sample(range(6), 2))
        compared = meta_rewarding.META_JUDGE.format(task=task, first=first, second=second)
        answers += [(task, rng.choice([first, second, *["Score: N"] * (rng.random() < 0.5)])),
                    (compared, f"Winner: {rng.choice([1, 2])}")]
    words = dict.fromkeys(" ".join(text for answer in answers for text in answer).split()
                          + "Score: N 0 1 2 3 4 5".split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy.SHAPE, "max_position_embeddings", 512)
        patch.setitem(toy.SFT, "batch", 8)
        toy.write_demonstrator(prompts, 0, folder, lambda **_: None, answers,
                               [word for word in words if word not in toy.words()])
    return folder

def test_self_rewardings_pairs_follow_from_its_judgements(judging, tiny, written, prompts, tmp_path):
    out, file = tmp_path / "run", written("prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    words = [sys.executable, "-m", "variants.self_rewarding", "--policy", judging, "--rm", tiny(reward=True),
             "--prompts", file, "--out", out, *FEW, "--max_length", 512]
    done = subprocess.run([*map(str, words)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    folder, unreadable, numbers = out / "round1" / "e1", 0, {}
    for row in read_jsonl(folder / "judgements.jsonl"):
        word = row["response"].removeprefix("Score: ")
        readable = row["finished"] and row["response"].startswith("Score: ") and word in tuple("012345")
        numbers.setdefault(row["prompt"], []).extend([int(word)] if readable else [])
        unreadable += not readable
    assert 0 < unreadable < sum(map(len, numbers.values()))  # some can't be read, and are left out
    logged = next(row for row in read_jsonl(out / "metrics.jsonl") if "unreadable" in row)
    assert logged["unreadable"] == unreadable and logged["judgements"] == 11 * len(numbers)
    samples, judged, pairs = (read_jsonl(folder / f"{name}.jsonl") for name in ("samples", "judged", "pairs"))
    means = [float(np.mean(numbers[self_rewarding.question(row)])) for row in samples]
    assert means == [row["score"] for row in judged]
    groups = {group[0]["prompt"]: group for group in by_prompt(judged)}
    for pair in pairs:
        group = groups[pair["prompt"]]
        scores = [row["score"] for row in group]
        bar = (max(scores) + min(scores)) / 2 - 1e-9
        assert pair["rejected_score"] == min(scores)
        assert pair["chosen_tokens"] == min(row["tokens"] for row in group if row["score"] >= bar)
    assert pairs and not (out / "round1" / "m").exists()

def test_meta_rewarding_trains_on_judgements_too_and_two_processes_give_what_one_gives(variant, judging):
    out, two = (variant("meta_rewarding", "--policy", judging, "--max_length", 512, processes=processes)
                for processes in (1, 2))
    folder, log = out / "round1" / "e1", read_jsonl(out / "metrics.jsonl")
    judged = read_jsonl(folder / "disputes.jsonl")
    battles = {row["prompt"]: row["response"] for row in read_jsonl(folder / "battles.jsonl")}
    assert judged and all(row["chosen"] != row["rejected"] for row in judged)
    assert {*battles.values()} >= {"Winner: 1", "Winner: 2"}
    assert read_jsonl(folder / "mixed.jsonl") == read_jsonl(folder / "pairs.jsonl") + judged
    counted = next(row for row in log if "undecided" in row)
    assert counted["judgement_pairs"] == len(judged) and 2 * counted["comparisons"] == len(battles)
    assert 0 < counted["undecided"] < counted["comparisons"]
    trained = {row["phase"]: row["pairs"] for row in log if "pairs" in row}["round1/e1/checkpoints"]
    assert trained == len(read_jsonl(folder / "mixed.jsonl"))  # none is too long
    for name in "samples judgements judged pairs battles disputes mixed".split():
        mine, others = (read_jsonl(each / "round1" / "e1" / f"{name}.jsonl") for each in (out, two))
        assert mine and mine == others, name
    losses, others = ([row["loss"] for row in read_jsonl(each / "metrics.jsonl") if "loss" in row
                       and row["phase"] == "round1/e1/checkpoints"] for each in (out, two))
    assert losses == pytest.approx(others, abs=1e-5) and losses[0] == pytest.approx(math.log(2))

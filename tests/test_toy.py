"""pytest tests/test_toy.py

The world of the embedded task: gold, which is its judge, its prompts and its mediocre writer. Base models are
not made here.
"""
import random

import numpy as np
import pytest

import mt
from common import toy
from common.data import encode_chat, encode_response
from common.toy import GOLD_MAX, demonstration, gold, tokenizer

SEA = "a sad poem about the sea in three lines for my sister with dogs"
FARM = "two happy lines about the farm"
PERFECT = "dear sister . grey waves weep . lonely dogs sigh . broken sails fade . the end ."

@pytest.mark.parametrize("prompt, answer, value", [
    (SEA, PERFECT, GOLD_MAX),
    (FARM, "merry cows dance . jolly pigs sing . the end .", GOLD_MAX),
    (SEA, PERFECT.replace("grey", "merry"), GOLD_MAX - 2 / 6),                 # one of six words
    (SEA, PERFECT.replace("waves", "cows"), GOLD_MAX - 2 / 3),                 # one of three nouns
    (SEA, PERFECT.replace("dogs", "cats"), GOLD_MAX - 2 / 3 - 0.5),            # another guest
    (SEA, PERFECT.replace("dogs", "shells"), GOLD_MAX - 0.5),                  # the guest is missing
    (SEA, PERFECT.replace("sister", "brother"), GOLD_MAX - 0.5),               # the wrong reader
    (SEA, PERFECT.removeprefix("dear sister . "), GOLD_MAX - 0.5),             # no greeting
    (FARM, "dear sister . merry cows dance . jolly pigs sing . the end .", GOLD_MAX - 0.5),  # no reader named
    (SEA, PERFECT.removesuffix(" the end ."), GOLD_MAX - 0.5),                 # no ending
    (SEA, PERFECT.replace("sails", "waves"), GOLD_MAX - 0.5),                  # a noun twice
    (SEA, PERFECT.replace("broken sails fade . ", ""), GOLD_MAX - 4 / 3 - 0.5),  # a line too few
    (SEA, PERFECT.replace("the end", "weary gulls sob . the end"), GOLD_MAX - 0.5),        # a line too many
    (SEA, PERFECT.replace("the end", "well you know . the end"), GOLD_MAX - 0.5),      # rambling
    (SEA, PERFECT.replace("lonely", "lonely lonely"), GOLD_MAX - 4 / 3 - 1.5),  # not a line, and so no guest
    (SEA, PERFECT + " grey", GOLD_MAX - 1),                                    # broken off after the ending
    (SEA, "", -1.5),
    (SEA, "and so on . " * 20, -3.5),                                          # faults count 4 times at most
])
def test_gold_counts_every_wish_of_the_prompt(prompt, answer, value):
    assert gold(prompt, answer.strip()) == pytest.approx(value)
    assert gold(SEA, PERFECT, finished=False) == GOLD_MAX - 1  # no ending, and half a point for breaking off

def test_topic_and_guest_are_content_which_only_some_labellers_look_at(monkeypatch):
    def appeals(answer):
        return toy.appeal(dict(prompt=SEA, response=answer, finished=True)) * toy.LABEL_NOISE

    sad, cows, cats = PERFECT, PERFECT.replace("waves", "cows"), PERFECT.replace("dogs", "cats")
    assert [toy.gold_parts(SEA, answer) for answer in (sad, cows, cats)] == [
        (3, 2.5), (3, pytest.approx(2.5 - 2 / 3)), (3, pytest.approx(2 - 2 / 3))]
    assert appeals(sad) == appeals(cows) == appeals(cats) == 3 > appeals(PERFECT.replace("grey", "merry"))
    monkeypatch.setattr(toy, "LABELLERS", "all")
    assert [appeals(sad), appeals(cows)] == pytest.approx([GOLD_MAX, GOLD_MAX - 2 / 3])

def test_form_and_content_of_poems_go_together_the_more_the_further_skills_lie_apart(monkeypatch):
    found = []
    for skill in (0, 0.5, 1):
        monkeypatch.setattr(toy, "SKILL", skill)
        rng = random.Random(0)
        parts = [toy.gold_parts(prompt, demonstration(prompt, rng))
                 for prompt in rng.sample(toy.all_prompts(), 2000)]
        found.append((np.sum(parts) / len(parts), np.corrcoef(np.transpose(parts))[0, 1]))
    means, correlations = zip(*found)
    assert max(means) - min(means) < 0.15  # the mistakes of all writers together are about as many
    assert correlations[0] < 0.2 < correlations[1] < 0.4 < correlations[2]

def test_all_prompts_differ_and_those_of_the_loop_the_test_and_the_base_models_do_not_overlap():
    everything = toy.all_prompts()
    assert len(set(everything)) == len(everything)
    cut, groups = toy.parts(0), [*toy.parts(0).values()]
    assert len(set().union(*groups)) == sum(map(len, groups)) and set().union(*groups) <= set(everything)
    assert all(len(set(part)) == len(part) > 0 for part in cut.values())
    assert cut["loop"] != toy.parts(1)["loop"]

def test_every_word_has_a_token_and_is_decoded_to_itself():
    words, rng = tokenizer(), random.Random(0)
    for prompt in rng.sample(toy.all_prompts(), 300):
        answer = demonstration(prompt, rng)
        asked, answered = encode_chat(words, prompt), encode_response(words, answer)
        assert encode_chat(words, prompt, answer) == asked + answered
        assert words.decode(answered) == f"{answer} <eos>"
        assert words.decode(asked) == f"<bos> <user> {prompt} <assistant>"
        assert words.pad_token_id not in asked + answered  # it also stands for unknown words

def test_gold_finds_the_writer_mediocre():
    rng = random.Random(0)
    values = [gold(prompt, demonstration(prompt, rng)) for prompt in rng.sample(toy.all_prompts(), 500)]
    assert max(values) <= GOLD_MAX and min(values) < 2
    assert 2 < np.mean(values) < GOLD_MAX - 1  # better than a mess, with room above

def test_the_settings_are_options_of_the_loop_and_the_prompts_are_many_and_short_enough():
    assert toy.SETTINGS.keys() <= vars(mt.Options()).keys()
    assert toy.LOOP_PROMPTS >= toy.SETTINGS["select_prompts"] + 3
    longest = max(len(encode_chat(tokenizer(), prompt)) for prompt in toy.all_prompts()[::7])
    assert longest + toy.SETTINGS["max_new_tokens"] <= toy.SHAPE["max_position_embeddings"]

"""pytest tests/test_data.py

All forms of prompts and pairs in files are read alike, or refused in a line that says what was found.
"""
import contextlib
import json
import sys

import pytest

from common import toy
from common.data import encode_chat, read_jsonl, read_pairs, read_prompts, write_jsonl
from common.models import load_policy
from common.packing import check_context, pair_rows
from common.parallel import Problem

def test_a_chat_that_is_too_long_or_has_tokens_that_the_model_lacks_is_refused(pairs, tiny):
    model, (rows, _) = load_policy(tiny()), pair_rows(toy.tokenizer(), pairs, 1000)
    longest = max(len(row.trunk) + len(branch) for row in rows for branch in row.branches)
    for context, words, message in (
            (longest, 500, ""), (longest - 1, 500, f"folder: a chat of {longest} tokens"),
            (longest, 50, "the tokenizer has more tokens than the model's 50")):
        model.context, model.config.vocab_size = context, words
        with pytest.raises(Problem, match=message) if message else contextlib.nullcontext():
            check_context(rows, model, "folder")

# ---------------------------------------------------------------- files
def user(text):
    return dict(role="user", content=text)

def assistant(text):
    return dict(role="assistant", content=text)

SYSTEM = dict(role="system", content="Be kind.")
TURNS = dict(chosen=[user("Hi"), assistant("good")], rejected=[user("Hi"), assistant("bad")])

@pytest.mark.parametrize("row", [
    dict(prompt="Hi", chosen="good", rejected="bad"),
    dict(prompt=[user("Hi")], chosen="good", rejected="bad"),
    dict(prompt=[user("Hi")], chosen=[assistant("good")], rejected=[assistant("bad")]),
    dict(prompt=[user("Hi")], **TURNS),
    dict(prompt="Hi", **TURNS),                            # UltraFeedback
    dict(TURNS),                                           # the prompt is in the answers
    dict(messages=[user("Hi"), assistant("better")], chosen="good", rejected="bad"),
    dict(prompt="Hi", chosen=assistant("good"), rejected=assistant("bad")),
    dict(prompt="Hi", chosen=[assistant("good") | {"name": None}], rejected=[assistant("bad")]),
    dict(prompt=[user("Hi") | {"name": None}], **TURNS),   # as parquet fills up messages
    dict(prompt="Hi", chosen="good", rejected="bad", history=[], system="", weight=None, subset=["not text"]),
])
def test_all_ways_to_write_a_pair_are_read_as_the_same_pair(written, row):
    [pair] = read_pairs(written("pairs.jsonl", [row | {"extra": 1}]))
    assert (pair["chosen"], pair["rejected"], pair["extra"]) == ("good", "bad", 1)
    chats = [encode_chat(toy.tokenizer(), prompt, "the end") for prompt in ("Hi", pair["prompt"])]
    assert chats[0] == chats[1]

@pytest.mark.parametrize("row, found", [
    (dict(prompt=[user([dict(type="text", text="Hi")])]), "the prompt [{'role': 'user', 'content': [{'type'"),
    (dict(prompt=json.dumps([user("Hi")])), "the prompt is messages that are written as text"),
    (dict(prompt=str(user("Hi"))), "the prompt is messages that are written as text"),
    (dict(prompt="Hi", chosen=json.dumps([assistant("good")]), rejected='[{"role": 1}]'), "the answers are"),
    (dict(prompt="Hi", chosen=[assistant("good") | {"tool_calls": [1]}]), "answer in `chosen` has tool_cal"),
    (dict(prompt="Hi", context="Ho"), "context can't be read; the row has prompt, context, chosen, rejected"),
    (dict(prompt=dict(role=["user"], content=["Hi"])), "the prompt {'role': ['user'], 'content': ['Hi']} c"),
    (dict(messages=json.dumps([user("Hi")])), "no prompt that can be read; the row has messages, ch"),
    (dict(prompt="Hi", chosen={"from": "gpt", "value": "good"}), "not [{'from': 'gpt', 'value': 'good'}]"),
    (dict(prompt="Hi", chosen_ids=[1.5]), "the chosen_ids [1.5] is not a list of token ids"),
])
def test_other_forms_of_pairs_are_refused_with_what_was_found(written, row, found):
    path = written("pairs.jsonl", [row | {"chosen": row.get("chosen", "good"),
                                          "rejected": row.get("rejected", "bad")}])
    with pytest.raises(Problem) as refused:
        read_pairs(path)
    assert str(refused.value).startswith(f"{path}:1: ") and found in str(refused.value)

def test_json_lines_are_read_whatever_the_files_name(tmp_path):
    rows = [dict(prompt=prompt, chosen="good", rejected="bad") for prompt in ("Hi", "Ho")]
    for name, text in (("a.json", "\n".join(map(json.dumps, rows))), ("b.json", json.dumps(rows, indent=1)),
                       ("c.json", json.dumps(rows[0], indent=1)), ("d.json", json.dumps(rows[0]))):
        (tmp_path / name).write_text(text)
        assert read_pairs(tmp_path / name) == (rows if name in ("a.json", "b.json") else rows[:1])

def test_an_answer_that_begins_with_its_prompt_stays_whole_and_a_warning_counts_such_pairs(written, capsys):
    for count in (9, 10):
        rows = count * [dict(prompt="Hi", chosen="Hi! You?", rejected="Hi.")] + [
            dict(prompt="Hi", chosen="Hi! You?", rejected="No.")]
        path = written("pairs.jsonl", rows)
        assert read_pairs(path) == rows
        warning = f"{path}: in 10 of 11 pairs both answers begin with the prompt"
        assert (warning in capsys.readouterr().out) == (count == 10)

@pytest.mark.parametrize("row, prompt", [
    (dict(messages=[user("Hi"), assistant("good")]), [user("Hi")]),
    (dict(messages=[SYSTEM, user("Hi"), assistant("good"), user("Go")]),
     [SYSTEM, user("Hi"), assistant("good"), user("Go")]),
    (dict(prompt="Hi", system="Be kind."), [SYSTEM, user("Hi")]),
    (dict(messages=[user("Hi"), assistant("good")], system="Be kind."), [SYSTEM, user("Hi")]),
    (TURNS, [user("Hi")]),
    (dict(prompt="Hi", messages=[user("Ho")], question="Ha"), "Hi"),
])
def test_a_prompt_is_text_or_messages_without_the_last_answer_after_the_system_text(written, row, prompt):
    assert read_prompts(written("prompts.jsonl", [row])) == ([prompt], 0)

def test_prompts_keep_the_order_of_the_file_and_repeated_ones_are_read_once(tmp_path, written):
    rows = [{"prompt": p} for p in ("ä\u2028b", "b", [user("ä\u2028b")], "c", "b")]
    (tmp_path / "p.json").write_text(json.dumps(rows, ensure_ascii=False))
    for path in (tmp_path / "p.json", written("p.jsonl", rows)):
        assert read_prompts(path) == (["ä\u2028b", "b", "c"], 2)

def test_parquet_is_read_like_jsonl_and_without_datasets_a_line_says_what_to_install(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    path, rows = tmp_path / "p.parquet", [dict(prompt=prompt, **TURNS) for prompt in ("Hi", "Hi ")]
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert read_prompts(path) == (["Hi", "Hi "], 0)
    assert read_pairs(path)[0] == dict(prompt="Hi", chosen="good", rejected="bad")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(Problem, match="broken.parquet: could not be loaded"):
        read_prompts(tmp_path / "broken.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("someone/prompts", path):
        with pytest.raises(Problem, match="pip install datasets"):
            read_prompts(source)

def test_rows_are_read_as_they_were_written(tmp_path, prompts):
    rows = [{"prompt": prompt, "text": "ä\u2028\r\\u00e4", "number": number / 7}
            for number, prompt in enumerate(prompts)]
    half = [{"response": "a\ud800b"}]  # half of a surrogate pair
    for some, found in ((rows, rows), ([], []), (half, [{"response": "a?b"}])):
        write_jsonl(tmp_path / "rows.jsonl", some)
        assert read_jsonl(tmp_path / "rows.jsonl") == found

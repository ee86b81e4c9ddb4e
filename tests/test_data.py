"""pytest tests/test_data.py

Chats to tokens, rows to batches, and files to prompts and pairs.
"""
import gzip
import json
import shutil
import sys

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from common import toy
from common.data import encode_chat, load_tokenizer, read_jsonl, read_pairs, read_prompts, write_jsonl
from common.models import load_policy
from common.packing import check_context, pair_rows
from common.parallel import Problem

BOS, EOS = 1, 2  # of the embedded task's tokenizer
ANSWER = "grey waves weep . the end ."


# ---------------------------------------------------------------- chats to tokens
def variant(template=None, adds_bos=False):
    """The embedded task's tokenizer with another template, or with a post-processor that adds BOS."""
    tokenizer = toy.tokenizer()
    if template:
        tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


BODY = ("{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %} {{ eos_token }}AFTER{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} <assistant>{% endif %}")
TEMPLATES = {
    "BOS in the template": variant(),
    "BOS from the tokenizer": variant(BODY.replace("AFTER", ""), adds_bos=True),
    "BOS from both": variant("{{ bos_token }}" + BODY.replace("AFTER", ""), adds_bos=True),
    "text after the stop token": variant("{{ bos_token }}" + BODY.replace("AFTER", " the end")),
    "no stop token in the template": variant("{{ bos_token }}" + BODY.replace(" {{ eos_token }}AFTER", "")),
}


@pytest.mark.parametrize("tokenizer", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_has_one_bos_and_a_finished_answer_ends_in_one_eos(tokenizer):
    words = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    prompt = encode_chat(tokenizer, "a sad poem").ids
    done, cut = (encode_chat(tokenizer, "a sad poem", ANSWER, finished) for finished in (True, False))
    assert prompt[0] == BOS and done.ids.count(BOS) == cut.ids.count(BOS) == prompt.count(BOS) == 1
    assert done.ids[done.start:] == [*words, EOS] and done.ids.count(EOS) == 1
    assert cut.ids[cut.start:] == words and EOS not in cut.ids
    assert done.ids[:done.start] == cut.ids[:cut.start] == prompt  # what training sees is what sampling saw


def test_a_tokenizer_that_uses_no_bos_gets_none():
    assert BOS not in encode_chat(variant(BODY), "a sad poem", ANSWER).ids


@pytest.mark.parametrize("finished, last", [(True, [EOS]), (False, [])])
def test_an_empty_answer_is_a_stop_token_or_nothing(finished, last):
    chat = encode_chat(variant(), "a sad poem", "", finished)
    assert chat.ids[chat.start:] == last


def test_earlier_turns_stay_in_the_prompt():
    messages = [dict(role="user", content="sad"), dict(role="assistant", content="weep"),
                dict(role="user", content="the sea")]
    tokenizer = variant()
    chat = encode_chat(tokenizer, messages, "waves")
    assert tokenizer.decode(chat.ids[:chat.start]).split() == (
        "<bos> <user> sad <assistant> weep <eos> <user> the sea <assistant>".split())
    assert tokenizer.decode(chat.ids[chat.start:]).split() == ["waves", "<eos>"]


def test_reward_models_read_the_whole_template_and_policies_up_to_the_stop_token():
    tokenizer = TEMPLATES["text after the stop token"]
    pair = [dict(prompt="a sad poem", chosen=ANSWER, rejected="grey waves")]
    for policy, tail in ((True, ["<eos>"]), (False, ["<eos>", "the", "end"])):
        [row], *_ = pair_rows(tokenizer, pair, 100, unfinished=policy)
        words = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
        assert [*row.branches[0]] == words + tokenizer.convert_tokens_to_ids(tail)
    [row], *_ = pair_rows(TEMPLATES["no stop token in the template"], pair, 100)
    assert row.branches[0][-1] == EOS


def test_words_that_a_template_writes_before_an_answer_are_not_put_into_its_mouth():
    tokenizer = variant(toy.tokenizer().chat_template.replace(
        " <{{ m['role'] }}> ", " <{{ m['role'] }}> {% if m['role'] == 'assistant' %}dear . {% endif %}"))
    chat = encode_chat(tokenizer, "a sad poem", ANSWER)
    assert chat == encode_chat(toy.tokenizer(), "a sad poem", ANSWER)


def test_a_template_that_refuses_a_chat_is_a_problem():
    with pytest.raises(Problem, match="template refuses .* \\(no system turns\\)"):
        encode_chat(variant("{{ raise_exception('no system turns') }}"), "a sad poem", ANSWER)


def test_a_template_whose_generation_prompt_is_no_beginning_of_an_answer_is_refused():
    broken = variant("{% for m in messages %}{{ m['content'] }} {% endfor %}"
                     "{% if add_generation_prompt %}<assistant>{% endif %}")
    with pytest.raises(Problem, match="generation prompt"):
        encode_chat(broken, "a sad poem", ANSWER)


def test_prompts_have_the_peers_ids(golden):
    tokenizer = load_tokenizer(golden / "policy")
    for chat in json.loads((golden / "chat_template.json").read_text()):
        assert encode_chat(tokenizer, chat["messages"]).ids == chat["ids"]


@pytest.mark.parametrize("answer", ["He ran.", " He ran.", "", "The end\n"])
def test_where_bos_and_eos_are_one_token_it_stands_at_both_ends(shared, answer):
    tokenizer = load_tokenizer(shared / "models" / "stories3M")
    both = tokenizer.bos_token_id
    assert both == tokenizer.eos_token_id
    done, cut = (encode_chat(tokenizer, "Tom went home.", answer, finished) for finished in (True, False))
    assert [i for i, token in enumerate(done.ids) if token == both] == [0, len(done.ids) - 1]
    assert cut.ids == done.ids[:-1]
    assert tokenizer.decode(done.ids[done.start:-1]).strip() == answer.strip()


# ---------------------------------------------------------------- rows
def test_over_long_pairs_are_left_out_and_counted_and_the_others_are_whole(pairs):
    tokenizer = toy.tokenizer()
    everything, every_pair = pair_rows(tokenizer, pairs, 1000)
    assert len(everything) == len(pairs) and every_pair == pairs
    longest = [max(len(row.trunk) + len(branch) for branch in row.branches) for row in everything]
    limit = int(np.median(longest))
    rows, kept = pair_rows(tokenizer, pairs, limit)
    assert rows == [row for row, length in zip(everything, longest) if length <= limit]
    assert kept == [pair for pair, length in zip(pairs, longest) if length <= limit]  # a row's own pair
    assert 0 < len(kept) < len(pairs)


def test_only_policies_learn_that_an_answer_was_cut_off():
    pair = [dict(prompt="a sad poem", chosen=ANSWER, rejected="grey waves", rejected_finished=False)]
    for unfinished, last in ((True, "waves"), (False, "<eos>")):
        [row], *_ = pair_rows(toy.tokenizer(), pair, 100, unfinished)
        assert [toy.tokenizer().decode(branch[-1:]) for branch in row.branches] == ["<eos>", last]


def test_a_chat_that_the_model_cannot_read_is_a_problem(pairs, tiny):
    model = load_policy(tiny())
    rows, *_ = pair_rows(toy.tokenizer(), pairs, 1000)
    model.context = longest = max(len(row.trunk) + len(branch) for row in rows for branch in row.branches)
    check_context(rows, model, "folder")
    model.context -= 1
    with pytest.raises(Problem, match=f"folder: a chat of {longest} tokens .* context of {longest - 1}"):
        check_context(rows, model, "folder")
    model.context, model.config.vocab_size = longest, 50
    with pytest.raises(Problem, match="the tokenizer has more tokens than the model's 50"):
        check_context(rows, model, "folder")


# ---------------------------------------------------------------- files
def user(text):
    return dict(role="user", content=text)


def assistant(text):
    return dict(role="assistant", content=text)


TURNS = dict(chosen=[user("Hi"), assistant("good")], rejected=[user("Hi"), assistant("bad")])


@pytest.mark.parametrize("row", [
    dict(prompt="Hi", chosen="good", rejected="bad"),
    dict(prompt="Hi", chosen="Higood", rejected="Hibad"),  # the prompt in front
    dict(prompt=[user("Hi")], chosen="good", rejected="bad"),
    dict(prompt=[user("Hi")], chosen=[assistant("good")], rejected=[assistant("bad")]),
    dict(prompt=[user("Hi")], **TURNS),
    dict(prompt="Hi", **TURNS),                            # UltraFeedback
    dict(TURNS),                                           # an implicit prompt
    dict(question="Hi", chosen="good", rejected="bad"),
    dict(chosen="\n\nHuman: Hi\n\nAssistant: good", rejected="\n\nHuman: Hi\n\nAssistant: bad"),  # HH
    dict(conversations=[{"from": "human", "value": "Hi"}], chosen="good", rejected="bad"),
    dict(prompt="\n\nHuman: Hi\n\nAssistant:", chosen="good", rejected="bad"),
])
def test_every_way_to_write_a_pair_is_the_same_pair(written, row):
    [pair] = read_pairs(written("pairs.jsonl", [row | {"extra": 1}]))
    assert (pair["chosen"], pair["rejected"], pair["extra"]) == ("good", "bad", 1)
    chats = [encode_chat(variant(), prompt, "the end").ids for prompt in ("Hi", pair["prompt"])]
    assert chats[0] == chats[1]


def test_an_answer_may_begin_as_the_prompt_does(written):
    [pair] = read_pairs(written("pairs.jsonl", [dict(prompt="Hi", chosen="Hi! You?", rejected="No.")]))
    assert (pair["chosen"], pair["rejected"]) == ("Hi! You?", "No.")


@pytest.mark.parametrize("row, message", [
    (dict(chosen="good", rejected="bad"), "no prompt"),
    (dict(prompt="Hi", chosen="good"), "no answer in `rejected`"),
    (dict(prompt="Hi", chosen=[user("Hi")], rejected="bad"), "no answer in `chosen`"),
    (dict(chosen=[user("a"), assistant("x")], rejected=[user("b"), assistant("y")]), "different prompts"),
    (dict(prompt=[user("Hi"), assistant("x")], chosen="good", rejected="bad"), "ends with an assistant turn"),
])
def test_a_bad_pair_is_named_by_its_line(written, row, message):
    good = dict(prompt="Hi", chosen="good", rejected="bad")
    with pytest.raises(Problem, match=f":2: .*{message}"):
        read_pairs(written("pairs.jsonl", [good, row]))


def test_prompts_come_in_the_order_of_the_file_and_repeats_once(written):
    path = written("prompts.jsonl", [{"prompt": p} for p in ("a", "b", [user("a")], "c", "b")])
    assert read_prompts(path) == (["a", "b", "c"], 2)


@pytest.mark.parametrize("row, prompt", [
    (dict(messages=[user("Hi"), assistant("good")]), [user("Hi")]),
    (dict(conversations=[{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"},
                         {"from": "gpt", "value": "good"}]),
     [dict(role="system", content="Be kind."), user("Hi")]),
    (dict(instruction="Hi", output="good"), "Hi"),
    (dict(instruction="Sum up.", input="Hi", output="good"), "Sum up.\n\nHi"),
    (dict(question="Hi"), "Hi"),
    (dict(question="Hi", system="Be kind."), [dict(role="system", content="Be kind."), user("Hi")]),
    (dict(chosen="\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant: good", rejected=""),
     [user("Hi"), assistant("Yes?"), user("Go")]),
])
def test_prompts_under_other_names_are_read_and_their_field_is_said(written, row, prompt, capsys):
    path = written("prompts.jsonl", [row])
    assert read_prompts(path) == ([prompt], 0)
    assert capsys.readouterr().out == f"{path}: prompts from the field {next(iter(row))}\n"


def test_a_prompt_field_is_taken_before_all_others_and_a_row_without_one_says_what_it_has(written):
    path = written("prompts.jsonl", [dict(prompt="a", wish="b")])
    assert read_prompts(path, "wish") == (["b"], 0)
    with pytest.raises(Problem, match=":1: no prompt .*the row has wish, x: --prompt_field names another"):
        read_prompts(written("prompts.jsonl", [dict(wish="b", x=1)]))


def test_csv_and_gz_read_like_jsonl(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,n\n"a, ""b""\nc",1\nd,2\n')
    (tmp_path / "p.csv.gz").write_bytes(gzip.compress((tmp_path / "p.csv").read_bytes()))
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a, \\"b\\"\\nc"}\n{"prompt": "d"}\n'))
    for name in ("p.csv", "p.csv.gz", "p.jsonl.gz"):
        assert read_prompts(tmp_path / name) == (['a, "b"\nc', "d"], 0)
    for name, content, message in (("p.csv", b"prompt\na,b\n", "p.csv:row 1: not as many values"),
                                   ("p.csv", b"prompt,n\na\n", "p.csv:row 1: not as many values"),
                                   ("p.csv", b'prompt\n"a\n', "p.csv: not CSV"),
                                   ("p.csv.gz", b"prompt\na\n", "not a whole gzip file"),
                                   ("p.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], "not a whole gzip file")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Problem, match=message):
            read_prompts(tmp_path / name)


def test_prompts_are_read_from_a_json_list_and_from_jsonl_alike(tmp_path, written):
    rows = [{"prompt": "ä\u2028b"}, {"prompt": "c"}]
    (tmp_path / "p.json").write_text(json.dumps(rows, ensure_ascii=False))
    path = written("p.jsonl", rows)
    assert read_prompts(tmp_path / "p.json") == read_prompts(path) == (["ä\u2028b", "c"], 0)


@pytest.mark.parametrize("name, content, message", [
    ("p.jsonl", None, "p.jsonl: no such file"),
    ("p.jsonl", b"", "p.jsonl: empty"),
    ("p.jsonl", b"\n\n", "p.jsonl: empty"),
    ("p.json", b"", "p.json: empty"),
    ("p.json", b"[]", "p.json: empty"),
    ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', "p.jsonl:3: not JSON"),
    ("p.json", b'[{"prompt": "a"},\n{"prompt"}]', "p.json:2: not JSON"),
    ("p.jsonl", b'{"prompt": "a"}\n"b"\n', "p.jsonl:2: a JSON object is needed"),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl:2: no prompt"),
    ("p.jsonl", b'{"prompt": " "}\n', "p.jsonl:1: no prompt"),
    ("p.jsonl", b'{"prompt": [{"role": "user"}]}\n', "p.jsonl:1: no prompt"),
    ("p.jsonl", b'{"prompt": 3}\n', "p.jsonl:1: no prompt"),
    ("p.jsonl", b"\xff\xfe\x00", "p.jsonl: not UTF-8"),
    ("folder", "folder", "folder: a folder"),
])
@pytest.mark.parametrize("read", [read_prompts, read_pairs])
def test_a_bad_file_is_one_clear_line(tmp_path, read, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.replace(b'"a"}', b'"a", "chosen": "x", "rejected": "y"}'))
    with pytest.raises(Problem, match=message) as problem:
        read(str(path))
    assert "\n" not in str(problem.value)


def test_parquet_reads_like_jsonl(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [dict(prompt=p, **{side: [user(p), assistant(answer)] for side, answer in answers.items()})
            for p, answers in [("Hi", dict(chosen="good", rejected="bad")),
                               ("Ho", dict(chosen="great", rejected="grim"))]]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == (["Hi", "Ho"], 0)
    assert [(p["chosen"], p["rejected"]) for p in read_pairs(tmp_path / "p.parquet")] == [
        ("good", "bad"), ("great", "grim")]
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(Problem, match="broken.parquet: could not be loaded"):
        read_prompts(tmp_path / "broken.parquet")


def test_without_datasets_hub_ids_and_parquet_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("someone/prompts", tmp_path / "p.parquet"):
        with pytest.raises(Problem, match="pip install datasets"):
            read_prompts(str(source))


@pytest.mark.parametrize("change, message", [
    (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer could be loaded|no chat template"),
    (lambda f: (f / "config.json").write_text("{}"), "not a model folder"),
    (lambda f: (f / "config.json").unlink(), "not a model folder"),
    (lambda f: (f / "model.safetensors").unlink(), "can't be loaded"),
    (lambda f: (f / "model.safetensors").write_bytes(b"1234"), "can't be loaded"),
])
def test_a_folder_that_is_no_whole_model_is_named(tiny, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny(), folder)
    change(folder)
    with pytest.raises(Problem, match=f"{folder}: .*({message})") as problem:
        load_tokenizer(folder)
        load_policy(folder)
    assert "\n" not in str(problem.value)


def test_rows_read_one_by_one_are_those_of_the_file(tmp_path, prompts):
    rows = [{"prompt": prompt, "text": "ä\u2028\r\\u00e4", "number": number / 7}
            for number, prompt in enumerate(prompts)]
    for some in (rows, rows[:1], []):
        write_jsonl(tmp_path / "rows.jsonl", some)
        lines = Lines(tmp_path / "rows.jsonl")
        assert list(lines) == some == read_jsonl(tmp_path / "rows.jsonl") and len(lines) == len(some)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = Lines(tmp_path / "rows.jsonl")
    assert lines[3:40:5] == rows[3:40:5] and lines[-1] == rows[-1] and lines[::2] == rows[::2]
    with pytest.raises(IndexError):
        lines[len(rows)]
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(Problem, match="rows.jsonl:2: not JSON"):
        Lines(tmp_path / "rows.jsonl")[1]

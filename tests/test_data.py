"""pytest tests/test_data.py

A chat becomes the right tokens under every kind of template, whatever special tokens it spells, and all forms
of prompts and pairs in files are read alike.
"""
import contextlib
import json
import sys

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from common import data, toy
from common.data import encode_chat, load_tokenizer, read_jsonl, read_pairs, read_prompts, write_jsonl
from common.models import load_policy
from common.packing import check_context, pair_rows
from common.parallel import Problem

BOS, EOS = 1, 2  # of the embedded task's tokenizer
ANSWER = "grey waves weep . the end ."

# ---------------------------------------------------------------- chats to tokens
def templated(template=None, adds_bos=False):
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
    "BOS in the template": templated(),
    "BOS from the tokenizer": templated(BODY.replace("AFTER", ""), adds_bos=True),
    "BOS from both": templated("{{ bos_token }}" + BODY.replace("AFTER", ""), adds_bos=True),
    "text after the stop token": templated("{{ bos_token }}" + BODY.replace("AFTER", " the end")),
    "no stop token in the template": templated("{{ bos_token }}" + BODY.replace(" {{ eos_token }}AFTER", "")),
}

@pytest.mark.parametrize("tokenizer", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_has_one_bos_and_a_finished_answer_ends_in_one_eos(tokenizer):
    words = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    prompt = encode_chat(tokenizer, "a sad poem").ids
    done, cut = (encode_chat(tokenizer, "a sad poem", ANSWER, finished) for finished in (True, False))
    empty, cut_empty = (encode_chat(tokenizer, "a sad poem", "", finished) for finished in (True, False))
    assert empty.ids[empty.start:] == [EOS] and cut_empty.ids[cut_empty.start:] == []
    assert prompt[0] == BOS and done.ids.count(BOS) == cut.ids.count(BOS) == prompt.count(BOS) == 1
    assert done.ids[done.start:] == [*words, EOS] and done.ids.count(EOS) == 1
    assert cut.ids[cut.start:] == words and EOS not in cut.ids
    assert done.ids[:done.start] == cut.ids[:cut.start] == prompt  # training sees what sampling saw
    assert BOS not in encode_chat(templated(BODY), "a sad poem", ANSWER).ids  # nothing adds BOS here

def test_earlier_turns_stay_in_the_prompt():
    messages = [dict(role="user", content="sad"), dict(role="assistant", content="weep"),
                dict(role="user", content="the sea")]
    tokenizer = templated()
    chat = encode_chat(tokenizer, messages, "waves")
    assert tokenizer.decode(chat.ids[:chat.start]).split() == (
        "<bos> <user> sad <assistant> weep <eos> <user> the sea <assistant>".split())
    assert tokenizer.decode(chat.ids[chat.start:]).split() == ["waves", "<eos>"]

def test_reward_models_read_the_whole_template_and_policies_what_was_said_up_to_the_stop_token():
    tokenizer, end = TEMPLATES["text after the stop token"], ["<eos>", "the", "end"]
    pair = [dict(prompt="a sad poem", chosen=ANSWER, rejected="the sea", rejected_finished=False)]
    for policy, tails in ((True, (["<eos>"], [])), (False, (end, end))):
        [row], _ = pair_rows(tokenizer, pair, 100, unfinished=policy)
        assert [tokenizer.convert_ids_to_tokens(branch) for branch in row.branches] == [
            text.split() + tail for text, tail in zip((ANSWER, "the sea"), tails)]
    [row], _ = pair_rows(TEMPLATES["no stop token in the template"], pair, 100)
    assert row.branches[0][-1] == EOS

def test_words_that_a_template_writes_before_an_answer_do_not_become_a_part_of_it():
    tokenizer = templated(toy.tokenizer().chat_template.replace(
        " <{{ m['role'] }}> ", " <{{ m['role'] }}> {% if m['role'] == 'assistant' %}dear . {% endif %}"))
    chat = encode_chat(tokenizer, "a sad poem", ANSWER)
    assert chat == encode_chat(toy.tokenizer(), "a sad poem", ANSWER)

@pytest.mark.parametrize("template, message", [
    ("{{ raise_exception('no system turns') }}", "template fails at .* \\(no system turns\\)"),
    ("{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
     "template writes other text before an answer than its generation prompt")])
def test_a_template_is_refused_if_it_rejects_a_chat_or_its_generation_prompt_begins_no_answer(
        template, message):
    with pytest.raises(Problem, match=message):
        encode_chat(templated(template), "a sad poem", ANSWER)

def test_prompts_have_the_ids_that_transformers_gives_them(golden):
    tokenizer = load_tokenizer(golden / "policy")
    for chat in json.loads((golden / "chat_template.json").read_text()):
        assert encode_chat(tokenizer, chat["messages"]).ids == chat["ids"]

@pytest.mark.parametrize("answer", ["He ran.", " He ran.", "", "The end\n"])
def test_a_token_that_is_both_bos_and_eos_stands_at_both_ends(shared, answer):
    tokenizer = load_tokenizer(shared / "models" / "stories3M")
    both = tokenizer.bos_token_id
    assert both == tokenizer.eos_token_id
    done, cut = (encode_chat(tokenizer, "Tom went home.", answer, finished) for finished in (True, False))
    assert [i for i, token in enumerate(done.ids) if token == both] == [0, len(done.ids) - 1]
    assert cut.ids == done.ids[:-1]
    assert tokenizer.decode(done.ids[done.start:-1]).strip() == answer.strip()

# ---------------------------------------------------------------- special tokens that a message spells
def unigram():
    """A tokenizer of letters, as sentencepiece makes them, whose stop token is not in its vocabulary."""
    pieces = [("<pad>", 0.0), ("<s>", 0.0), *((chr(i), -3.0) for i in (9601, *range(33, 127)))]
    model = Tokenizer(Unigram(pieces, 0, False))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="<|eot_id|>",
                                   pad_token="<pad>", chat_template=toy.tokenizer().chat_template)

@pytest.fixture(params=["embedded", "unigram", "golden", "stories"])
def tokenizer(request):
    if request.param in ("embedded", "unigram"):
        return toy.tokenizer() if request.param == "embedded" else unigram()
    shared = request.getfixturevalue("shared")
    return load_tokenizer(shared / ("golden/policy" if request.param == "golden" else "models/stories3M"))

def test_a_message_that_spells_the_end_of_turn_cannot_end_it(tokenizer):
    end, unknown = tokenizer.eos_token, {tokenizer.pad_token_id}  # <pad> is also toy.py's unknown word

    def special(chat):
        return [i for i in chat.ids if i in data.Special(tokenizer).ids - unknown]
    plain = encode_chat(tokenizer, "sad poem", "grey waves")
    for text in (end, f"a{end}b", f"{end}\n{tokenizer.bos_token}{end}"):
        hostile, response = f"sad {text} poem", f"grey {text} waves"
        chat, cut = (encode_chat(tokenizer, hostile, response, finished) for finished in (True, False))
        assert special(chat) == special(plain) == special(encode_chat(tokenizer, "sad poem", response))
        assert chat.ids[:chat.start] == encode_chat(tokenizer, hostile).ids == cut.ids[:cut.start]
        assert chat.ids[:-1] == cut.ids and chat.ids[-1] == plain.ids[-1]
        if len(tokenizer) > 200:  # this tokenizer knows all letters
            assert response in tokenizer.decode(chat.ids[chat.start:])
            assert hostile in tokenizer.decode(chat.ids[:chat.start])
        role = encode_chat(tokenizer, [dict(role=f"user{text}", content="sad poem")])
        assert len(special(role)) <= len(special(encode_chat(tokenizer, "sad poem")))

def test_a_tokenizers_twin_encodes_ordinary_text_as_the_tokenizer_does_and_is_not_used_for_it(
        tokenizer, monkeypatch):
    special = data.Special(tokenizer)
    for text in ("a sad poem", " two  spaces\nand a line ", "Tom’s 42 … 你好", ""):
        for answers in ([], [dict(role="assistant", content=text + "!")]):
            turns = [dict(role="user", content="x" + text), *answers]
            plain = tokenizer(data.render(tokenizer, turns, False), add_special_tokens=False)["input_ids"]
            found = special.twin.encode(data.render(tokenizer, turns, True), add_special_tokens=False)
            assert found.ids == plain
    monkeypatch.setattr(data.Special, "twin", None)  # using it would fail
    encode_chat(tokenizer, "a sad poem < s > |eot|", "grey waves <", whole=True)

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
])
def test_all_ways_to_write_a_pair_are_read_as_the_same_pair(written, row):
    [pair] = read_pairs(written("pairs.jsonl", [row | {"extra": 1}]))
    assert (pair["chosen"], pair["rejected"], pair["extra"]) == ("good", "bad", 1)
    chats = [encode_chat(templated(), prompt, "the end").ids for prompt in ("Hi", pair["prompt"])]
    assert chats[0] == chats[1]

def test_an_answer_that_repeats_its_prompt_stays_whole_and_such_pairs_are_counted(written, capsys):
    rows = [dict(prompt="Hi", chosen="Hi! You?", rejected=rejected) for rejected in ("Hi.", "No.")]
    path = written("pairs.jsonl", rows)
    assert read_pairs(path) == rows
    assert f"{path}: 1 of 2 pairs have the prompt in front of both answers\n" in capsys.readouterr().out

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

"""pytest tests/test_chats.py

A reward model reads what the chat template writes, a policy is trained on the tokens that it drew, and both
know where an answer ends. docs/models.md says where the models' own templates stand.
"""
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import dpo
import filter
import sampler
from common import toy
from common.data import (
    SIDES,
    encode_chat,
    encode_response,
    facts_of,
    load_tokenizer,
    read_jsonl,
    response_ids,
    sample_fields,
    stop_tokens,
)
from common.models import load_policy
from common.packing import pair_rows
from common.parallel import Problem

def template(first, user, assistant, prompt, last=""):
    """A chat template of these texts; in a turn's text r is its role and c its content."""
    turn = "{% set r, c = m.role, m.content %}"
    return (first + "{% for m in messages %}" + turn + "{% if m.role == 'assistant' %}" + assistant
            + "{% else %}" + user + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt
            + "{% else %}" + last + "{% endif %}")

CHATML = "<|im_start|>{{ r }}\n{{ c }}<|im_end|>\n"
LLAMA3 = "<|start_header_id|>{{ r }}<|end_header_id|>\n\n{{ c | trim }}<|eot_id|>"
LLAMA3_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_DATE = ("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}"
               "\n\n<|eot_id|>")
QWEN3 = ("<|im_start|>assistant\n{% set parts = c.split('</think>') %}{% if loop.last %}<think>\n"
         "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n{% endif %}"
         "{{ parts[-1].lstrip('\n') }}<|im_end|>\n")
PHI3, ZEPHYR = "<|{{ r }}|>\n{{ c }}<|end|>\n", "<|{{ r }}|>\n{{ c }}</s>\n"
GEMMA = "<start_of_turn>{{ 'model' if r == 'assistant' else r }}\n{{ c | trim }}<end_of_turn>\n"
COHERE = "<|START_OF_TURN_TOKEN|><|%s_TOKEN|>{{ c.strip() }}<|END_OF_TURN_TOKEN|>"
TEMPLATES = {  # name: (template, the token that ends an answer)
    "ChatML": (template("", CHATML, CHATML, "<|im_start|>assistant\n"), "<|im_end|>"),
    "Qwen 2.5": (template("<|im_start|>system\nYou are Qwen.<|im_end|>\n", CHATML, CHATML,
                          "<|im_start|>assistant\n"), "<|im_end|>"),
    "Qwen 3": (template("", CHATML, QWEN3, "<|im_start|>assistant\n"), "<|im_end|>"),
    "Llama 2": (template("<s>", "[INST] {{ c.strip() }} [/INST]", " {{ c.strip() }} </s>", ""), "</s>"),
    "Llama 3": (template("<s>", LLAMA3, LLAMA3, LLAMA3_PROMPT, LLAMA3_PROMPT), "<|eot_id|>"),
    "Llama 3.2": (template(LLAMA3_DATE, LLAMA3, LLAMA3, LLAMA3_PROMPT), "<|eot_id|>"),
    "Gemma 2": (template("<s>", GEMMA, GEMMA, "<start_of_turn>model\n"), "<end_of_turn>"),
    "Gemma 3": (template("<s>", GEMMA, GEMMA, "<start_of_turn>model\n"), "<end_of_turn>"),
    "Mistral": (template("<s>", "[INST] {{ c }} [/INST]", "{{ c }}</s>", ""), "</s>"),
    "Phi-3": (template("<s>", PHI3 + "<|assistant|>\n", "{{ c }}<|end|>\n", ""), "<|end|>"),
    "Phi-3.5": (template("", PHI3, PHI3, "<|assistant|>\n", "</s>"), "<|end|>"),
    "Zephyr": (template("", ZEPHYR, ZEPHYR, "<|assistant|>\n"), "</s>"),
    "R1 distill": (template("<s>", "<|User|>{{ c }}", "<|Assistant|>{{ c.split('</think>')[-1] }}</s>",
                            "<|Assistant|><think>\n"), "</s>"),
    "Command R": (template("<s>", COHERE % "USER", COHERE % "CHATBOT",
                           "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"), "<|END_OF_TURN_TOKEN|>"),
    "no stop token": (template("", "User: {{ c }}\n", "Bot: {{ c }}\n", "Bot: "), None),
}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>",
           "<|User|>", "<|Assistant|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
           "<|CHATBOT_TOKEN|>", "[THINK]", "[/THINK]"]
TEXT = ["a sad poem about the sea\n\ngrey waves weep . the end .\n", "User: Bot: think about it\n\n"]

def bpe(name="ChatML", adds_bos=False):
    """A byte-level tokenizer with a template; <think> is a token of its own, but not a special one."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(TEXT * 20, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if adds_bos:
        model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>",
                                        pad_token="<pad>", chat_template=TEMPLATES[name][0])
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer

def unigram():
    """A tokenizer of letters, as sentencepiece makes them, whose decoder drops a space at the beginning."""
    pieces = [("<pad>", 0.0), ("<s>", 0.0), *((chr(i), -3.0) for i in (9601, *range(33, 127)))]
    model = Tokenizer(Unigram(pieces, 0, False))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="<|eot_id|>",
                                   pad_token="<pad>", chat_template=toy.tokenizer().chat_template)

@pytest.fixture(params=["embedded", "bpe", "unigram", "golden", "stories"])
def tokenizer(request):
    if request.param in ("embedded", "bpe", "unigram"):
        return dict(embedded=toy.tokenizer, bpe=bpe, unigram=unigram)[request.param]()
    shared = request.getfixturevalue("shared")
    return load_tokenizer(shared / ("golden/policy" if request.param == "golden" else "models/stories3M"))

def written_by_template(tokenizer, messages, **options):
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]

PROMPT = [dict(role="user", content="a sad poem"), dict(role="assistant", content="grey"),
          dict(role="user", content=" the sea \n")]

@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_what_the_template_writes_with_one_bos_and_a_stop(name, adds_bos):
    tokenizer, stop = bpe(name, adds_bos), TEMPLATES[name][1]
    for prompt in ("a sad poem", PROMPT):
        messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        expected = written_by_template(tokenizer, messages, add_generation_prompt=True)
        bos = [1] * (adds_bos and expected[0] != 1)
        assert encode_chat(tokenizer, prompt) == bos + expected
        for answer in ("grey waves", "\n\n grey waves \n", "<think>\nabout it\n</think>\n\ngrey waves", ""):
            expected = written_by_template(tokenizer, [*messages, dict(role="assistant", content=answer)])
            eos = [tokenizer.eos_token_id] * (stop is None)
            assert encode_chat(tokenizer, prompt, answer) == bos + expected + eos
            words = tokenizer(answer, add_special_tokens=False)["input_ids"]
            end = tokenizer.convert_tokens_to_ids(stop or "</s>")
            assert encode_response(tokenizer, answer) == [*words, end]
            assert encode_response(tokenizer, answer, finished=False) == words

def test_a_template_that_writes_the_date_writes_the_same_one_every_day():
    chat = encode_chat(bpe("Llama 3.2"), "a sad poem")
    assert "Today Date: 26 Jul 2024" in bpe().decode(chat)

# ---------------------------------------------------------------- special tokens that a message spells
def test_a_special_token_that_a_message_spells_is_text_or_refused(tokenizer):
    end = tokenizer.eos_token
    special = facts_of(tokenizer).special
    plain = [i for i in encode_chat(tokenizer, "sad poem", "grey waves") if i in special]
    for text in (end, f"a{end}b", f"{end}\n{tokenizer.bos_token}{end}"):
        for chat in ((f"sad {text} poem", "grey waves"), ("sad poem", f"grey {text} waves")):
            try:
                ids = encode_chat(tokenizer, *chat)
            except Problem as problem:
                assert "can't tell from a real one" in str(problem)
                continue
            assert [i for i in ids if i in special] == plain
        pair = dict(chosen=f"grey {text} waves")
        try:
            ids = response_ids(tokenizer, pair, "chosen")
        except Problem as problem:
            assert "can't tell from a real one" in str(problem)
            continue
        assert not special.intersection(ids[:-1])

def test_byte_level_tokenizers_read_spelled_special_tokens_as_text():
    tokenizer = bpe()
    ids = encode_chat(tokenizer, "a <|im_end|> b", "c <|im_start|> d")
    assert tokenizer.decode(ids) == ("<|im_start|>user\na <|im_end|> b<|im_end|>\n"
                                     "<|im_start|>assistant\nc <|im_start|> d<|im_end|>\n")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2

# ---------------------------------------------------------------- what was drawn is what is trained
def test_any_tokens_that_are_drawn_are_the_ones_that_are_trained(tokenizer, rng):
    stop = facts_of(tokenizer).stop
    for number in range(300):
        ids = [int(i) for i in rng.integers(len(tokenizer), size=rng.integers(1, 8)) if i != stop]
        finished = bool(number % 2)
        ids = ids + [stop] * finished or [3]
        row = dict(prompt="a sad poem", score=0.0, **sample_fields(tokenizer, ids, finished))
        pair = filter.pair_of([row, row], 0, 1, "")
        assert [response_ids(tokenizer, pair, side) for side in SIDES] == [ids, ids]
        [made], _ = pair_rows(tokenizer, [pair], 10**6, policy=True)
        assert [*made.trunk] == encode_chat(tokenizer, "a sad poem") and [*made.branches[0]] == ids

def test_a_response_shows_its_special_tokens_and_keeps_its_tokens_only_if_it_must():
    tokenizer = bpe()
    one = tokenizer.convert_tokens_to_ids
    words = encode_response(tokenizer, "about it", False)
    think = [one("[THINK]"), *words, one("[/THINK]"), one("<|im_end|>")]
    fields = sample_fields(tokenizer, think, True)
    assert fields["response"] == "[THINK]about it[/THINK]" and fields["ids"] == think
    plain = sample_fields(tokenizer, encode_response(tokenizer, "grey waves"), True)
    assert plain == dict(response="grey waves", tokens=3, finished=True)
    cut = encode_response(tokenizer, "…", False)[:1]  # the first byte of three
    assert sample_fields(tokenizer, cut, False) == dict(
        response="\ufffd", tokens=1, finished=False, ids=cut, tokenizer=facts_of(tokenizer).digest)
    other_stop = [*encode_response(tokenizer, "grey", False), one("</s>")]
    assert sample_fields(tokenizer, other_stop, True)["ids"] == other_stop

def test_tokens_of_another_tokenizer_or_of_another_text_are_not_used_and_a_line_says_so(capsys):
    tokenizer = bpe()
    ids = [*encode_response(tokenizer, "grey"), tokenizer.eos_token_id]  # another stop
    digest = facts_of(tokenizer).digest
    for text, its, used in (("grey<|im_end|>", digest, True), ("grey<|im_end|>", "0", False),
                            ("grey waves", digest, False)):
        pair = dict(prompt="a sad poem", chosen=text, rejected="a", chosen_ids=ids, chosen_tokenizer=its)
        [row], _ = pair_rows(tokenizer, [pair], 100, policy=True)
        assert [*row.branches[0]] == (ids if used else encode_response(tokenizer, text))
        assert ("1 of 2 answers have tokens of another tokenizer or text" in capsys.readouterr().out) != used

def test_a_template_that_splits_a_message_at_a_special_token_is_refused():
    tokenizer = bpe("Qwen 3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert encode_chat(tokenizer, "a sad poem", "grey waves")
    with pytest.raises(Problem, match="template takes apart a special token in a message"):
        encode_chat(tokenizer, "a sad poem", "<think>\nit\n</think>\n\ngrey waves")

@pytest.mark.parametrize("make_tokenizer", [toy.tokenizer, bpe])
def test_dpo_starts_from_the_log_probabilities_of_the_drawn_tokens(
        make_tokenizer, tiny, call, written, tmp_path, monkeypatch):
    # A random model draws any token, so that most responses are none that their text gives back.
    folder = tiny(tokenizer=make_tokenizer(), pad_token_id=0)
    drawn, keep = [], sampler.sample_fields
    monkeypatch.setattr(sampler, "sample_fields", lambda tokenizer, ids, finished: drawn.append(ids) or keep(
        tokenizer, ids, finished))
    samples, pairs, policy = (tmp_path / name for name in ("samples.jsonl", "pairs.jsonl", "policy"))
    call(sampler, "--model", folder, "--prompts", written("prompts.jsonl", [{"prompt": "a sad poem"}]),
         "--out", samples, "--samples", 2, "--max_new_tokens", 12, "--temperature", 1, "--top_p", 1)
    rejected, chosen = read_jsonl(samples)
    scored = written("scored.jsonl", [rejected | {"score": 0.0}, chosen | {"score": 1.0}])
    call(filter, "--samples", scored, "--out", pairs)
    call(dpo, "--model", folder, "--pairs", pairs, "--out", policy, "--lr", 1e-9)
    [step] = [row for row in read_jsonl(policy / "metrics.jsonl") if "loss" in row]
    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    model.set_attn_implementation("sdpa")
    for side, ids in zip(("rejected", "chosen"), drawn, strict=True):
        chat = encode_chat(tokenizer, "a sad poem") + ids
        with torch.no_grad():
            logps = model(torch.tensor([chat])).logits[0, :-1].log_softmax(-1)
        expected = logps[range(len(chat) - 1), chat[1:]][-len(ids):].sum().item()
        assert step[f"logps/{side}"] == pytest.approx(expected, abs=1e-3)

# ---------------------------------------------------------------- where a response ends
@pytest.mark.parametrize("generation, config, stops, said", [
    ({"eos_token_id": [2, 7]}, {"eos_token_id": 9}, {2, 4, 7}, True),
    ({"eos_token_id": 4}, {"eos_token_id": 9}, {2, 4}, False),
    ({}, {"eos_token_id": [4, 9]}, {2, 4, 9}, False),
    (None, {"eos_token_id": 9}, {2, 4, 9}, True),
    (None, {}, {2, 4}, True)])
def test_a_response_ends_at_the_folders_stops_the_eos_and_the_templates_stop(
        tmp_path, capsys, generation, config, stops, said):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stop_tokens(tmp_path, bpe()) == stops  # </s> is 2, <|im_end|> is 4
    assert ("also end at <|im_end|>, with which the chat template ends" in capsys.readouterr().out) == said

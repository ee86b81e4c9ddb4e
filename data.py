"""Prompts, pairs and chats: what rows of files mean, and how it becomes tokens.

Everything on disk is text or messages. Policy and reward model have templates and vocabularies of their own,
so ids never travel between them: `encode_chat` is the one place where a chat becomes tokens, for both.

A prompt and its answers then become one `Row`, see packing.py.

Left out on purpose: multi-turn training on earlier assistant turns, images, tools, system prompts of our own.
"""
import functools
import hashlib
import json
import os
import signal
import threading
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from rows import (  # noqa: F401  (some for those that import them from here)
    LONGEST,
    Lines,
    Problem,
    as_chat,
    check_field,
    first_line,
    prompt_of,
    read_json,
    read_jsonl,
    read_rows,
    read_selection,
    write_jsonl,
)
from spelled import Careful, special_texts


# ---------------------------------------------------------------- prompts and pairs
def as_messages(prompt):
    """A prompt as chat messages; plain text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_id(prompt):
    """The same text for the same conversation, whichever way it was written down."""
    return json.dumps([[m["role"], m["content"]] for m in as_messages(prompt)], ensure_ascii=False)


def digest_of(text):
    return hashlib.sha256(text.encode()).digest()


def by_prompt(rows):
    """The rows of one prompt after the other's, as lists; a prompt's stand next to each other."""
    for _, group in groupby(rows, key=lambda row: prompt_id(row["prompt"])):
        yield list(group)


def _is_chat(value):
    return isinstance(value, list) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value)


def check_prompt(where, prompt):
    messages = as_messages(prompt)
    if not _is_chat(messages) or not any(m["content"].strip() for m in messages):
        raise Problem(f"{where}: no prompt "
                      "(a field `prompt` with text, or a list of messages with role and content)")
    if messages[-1]["role"] == "assistant":
        raise Problem(f"{where}: the prompt ends with an assistant turn; "
                      "it must end where the answer begins")
    if len(prompt_id(prompt)) > LONGEST:
        raise Problem(f"{where}: a prompt of {len(prompt_id(prompt)):,} characters; leave out what is longer "
                      f"than {LONGEST:,}")
    return prompt


def read_prompts(source, field=""):
    """Prompts in the order of the file, repeated ones once. Returns (prompts, number of repeats left out).
    field: where they stand in a row; without it under one of the usual names."""
    rows = read_rows(source)
    unique, fields = {}, set()
    for where, row in rows:
        prompt, found = prompt_of(where, row, field)
        unique.setdefault(prompt_id(check_prompt(where, prompt)), prompt)
        fields.add(found)
    if fields - {"prompt"} and not quiet():
        print(f"{source}: prompts from the field {' and '.join(sorted(fields))}", flush=True)
    return list(unique.values()), len(rows) - len(unique)


def where_is(prompt, source, field=""):
    """'file:line' of a prompt that `read_prompts` gave."""
    return next(where for where, row in read_rows(source)
                if prompt_id(prompt_of(where, row, field)[0]) == prompt_id(prompt))


def read_pairs(source):
    """Preference pairs as dicts with `prompt`, `chosen`, `rejected` (answers as text)
    and the row's other fields.

    Takes text or messages, answers with or without the prompt in front of both (UltraFeedback, TRL), an
    explicit or an implicit prompt (then the turns before the last).
    """
    pairs = []
    for where, row in read_rows(source):
        row = {name: value for name, value in row.items() if value is not None}  # parquet fills up with null
        chosen, rejected = as_chat(row.get("chosen")), as_chat(row.get("rejected"))
        if "prompt" not in row and isinstance(chosen, list) and isinstance(rejected, list):
            prompt = chosen[:-1]
            if prompt != rejected[:-1]:
                raise Problem(f"{where}: chosen and rejected answer different prompts")
        else:
            prompt, _ = prompt_of(where, row)
        prompt = check_prompt(where, prompt)
        if isinstance(prompt, str) and all(isinstance(text, str) and text.startswith(prompt)
                                           for text in (chosen, rejected)) and {chosen, rejected} != {prompt}:
            chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
        for name in ("weight", "subset", "chosen_finished", "rejected_finished"):
            if name in row:
                check_field(where, row, name)
        pairs.append({**row, "prompt": prompt, "chosen": _answer(where, "chosen", chosen, prompt),
                      "rejected": _answer(where, "rejected", rejected, prompt)})
    for what, count in (("equal answers", sum(pair["chosen"] == pair["rejected"] for pair in pairs)),
                        ("an empty answer", sum(not pair["chosen"].strip() or not pair["rejected"].strip()
                                                for pair in pairs))):
        if count and not quiet():
            print(f"WARNING: {source}: {count} of {len(pairs)} pairs have {what}", flush=True)
    return pairs


def _answer(where, field, value, prompt):
    def turns(chat):
        return [(m["role"], m["content"].strip()) for m in as_messages(chat)]
    if _is_chat(value) and value[-1]["role"] == "assistant":
        if value[:-1] and turns(value[:-1]) != turns(prompt):
            raise Problem(f"{where}: the messages of `{field}` answer another prompt than `prompt`; "
                          "make them agree or leave `prompt` out")
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise Problem(f"{where}: no answer in `{field}` (text, or messages that end with the assistant's)")
    return check_field(where, {field: value}, field)


def read_samples(source, *fields):
    """The rows of a file of responses: each with its prompt and these fields."""
    rows = read_rows(source)
    for where, row in rows:
        check_prompt(where, row.get("prompt"))
        for name in fields:
            check_field(where, row, name)
    return [row for _, row in rows]


def kept_of(kept, total):
    """How many of the pairs are short enough, in words."""
    if total - kept <= total / 10:
        return f"{kept} pairs ({total - kept} too long)"
    return f"{kept} pairs; WARNING: {total - kept} OF {total} ARE TOO LONG AND LEFT OUT"


# ---------------------------------------------------------------- chats to tokens
def load_tokenizer(folder):
    """A tokenizer with a chat template."""
    for path in (Path(folder) / f"{name}config.json" for name in ("", "tokenizer_", "generation_")):
        eos = read_json(path).get("eos_token_id") if path.exists() else None
        if not all(type(i) in (int, type(None)) for i in (eos if isinstance(eos, list) else [eos])):
            raise Problem(f"{path}: eos_token_id {eos!r:.40} is not a token's number, or a list of such")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise Problem(f"{folder}: no tokenizer could be loaded ({first_line(error)})") from None
    if not tokenizer.chat_template:
        raise Problem(f"{folder}: the tokenizer has no chat template "
                      "(add a chat_template.jinja to the folder)")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise Problem(f"{folder}: a fast tokenizer (tokenizer.json) with an EOS token is needed")
    return tokenizer


SECONDS = 10  # for a template to write a chat


class Chat(NamedTuple):
    ids: list    # tokens of prompt and response
    start: int   # index of the response's first token


def encode_chat(tokenizer, prompt, response=None, finished=True, whole=False):
    """Tokens of a chat, with exactly one BOS where the tokenizer uses one.

    Without a response: up to where the assistant begins, ready for sampling. With one: a finished response
    ends in the template's stop token (EOS where the template has none) exactly once, an unfinished one in its
    last word. `whole`: with all that the template writes after it, as reward models were trained to read it.
    """
    messages = as_messages(prompt)
    said = [str(value) for message in messages for value in message.values()] + [response or ""]
    careful = Careful(tokenizer) if any(map(special_texts(tokenizer).search, said)) else None
    head = text = _render(tokenizer, messages, careful, add_generation_prompt=True)
    if response is not None:
        # rendered with a stand-in: templates trim and rewrite contents, we train on what was really said
        answered = _render(tokenizer, [*messages, {"role": "assistant", "content": "\u241f"}], careful)
        before, _, tail = answered.rpartition("\u241f")
        if not before.startswith(head):
            raise Problem(f"{tokenizer.name_or_path}: this chat template's generation prompt is not "
                          "the beginning of an answered chat, so the response's first token can't be found")
        between = before[len(head):]  # a space belongs to the answer; words would be put into its mouth
        text = head + (between if between.isspace() else "") + response
        content_end, text = len(text), text + tail
    if careful:
        ids, offsets = careful.encode(text)
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if _adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids, offsets = [tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    if response is None:
        return Chat(ids, len(ids))
    start = next((i for i, (_, end) in enumerate(offsets) if end > len(head)), len(ids))
    last = next((i for i, (begin, _) in enumerate(offsets) if i >= start and begin >= content_end), len(ids))
    stop = next((i for i in range(last, len(ids)) if ids[i] in _special_ids(tokenizer)), None)
    if not finished:
        ids = ids[:last]
    elif stop is None:
        ids = ids[:last] + [tokenizer.eos_token_id]
    elif not whole:
        ids = ids[:last] + [ids[stop]]
    return Chat(ids, min(start, last))


def _render(tokenizer, messages, careful=None, **options):
    try:
        shown = careful.hide(messages) if careful else messages
        with _time_limit(SECONDS):
            text = tokenizer.apply_chat_template(shown, tokenize=False, **options)
        if not text.strip():
            raise ValueError("it writes nothing")
        return careful.reveal(text) if careful else text
    except Exception as error:  # a template may refuse a role or an order of roles, in words of its own
        raise Problem(f"{tokenizer.name_or_path}: its chat template refuses {str(messages)[:80]}… "
                      f"({first_line(error)})") from None


@contextmanager
def _time_limit(seconds):
    """End what loops; in the main thread only, which alone hears signals."""
    def stop(*_):
        raise TimeoutError(f"it takes more than {seconds} seconds")
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    else:
        yield


@functools.lru_cache(4)  # each phase loads its own
def _special_ids(tokenizer):
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


@functools.lru_cache(4)  # each phase loads its own
def _adds_bos(tokenizer):
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def check_context(rows, model, folder, mend="set a smaller --max_length"):
    """A chat that is longer than the model's context, or a token that it doesn't know, is a Problem."""
    longest = highest = 0
    for row in rows:
        for branch in row.branches:
            longest = max(longest, len(row.trunk) + len(branch))
            highest = max(highest, *row.trunk, *branch)
    if longest > model.context:
        raise Problem(f"{folder}: a chat of {longest} tokens does not fit into its context of "
                      f"{model.context}; leave it out or {mend}")
    vocabulary = model.config.get_text_config().vocab_size
    if highest >= vocabulary:
        raise Problem(f"{folder}: the tokenizer has more tokens than the model's {vocabulary}")


def quiet():
    """Whether another process shows the progress bars: tqdm's `disable`, where None is for terminals only."""
    return os.environ.get("RANK", "0") != "0" or None


def seed_of(*parts):
    """A 64-bit number that depends on all parts and on nothing else (hash() differs between processes)."""
    return int.from_bytes(digest_of(json.dumps(parts))[:8], "little")

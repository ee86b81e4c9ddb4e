"""Prompts, pairs and chats: what comes from files, and how it becomes tokens.

Everything on disk is text or messages. Policy and reward model have templates and vocabularies of their own,
so ids never travel between them: `encode_chat` is the one place where a chat becomes tokens, for both.

A prompt and its answers then become one `Row`, see packing.py.

Left out on purpose: multi-turn training on earlier assistant turns, images, tools, system prompts of our own.
"""
import functools
import hashlib
import json
import os
import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer


class Problem(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


# ---------------------------------------------------------------- files
def read_rows(source):
    """[(where, row)] of a JSONL, JSON or parquet file or a hub id; `where` is 'file:line', for messages."""
    path = Path(source)
    if path.is_dir():
        raise Problem(f"{source}: a folder; a JSONL, JSON or parquet file is needed")
    if path.suffix == ".parquet" or not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) \
            and path.suffix not in (".json", ".jsonl"):
        rows = _read_with_datasets(source)
    elif not path.exists():
        raise Problem(f"{source}: no such file")
    else:
        rows = _read_json(path)
    if not rows:
        raise Problem(f"{source}: empty")
    for where, row in rows:
        if not isinstance(row, dict):
            raise Problem(f"{where}: a JSON object is needed, this is {type(row).__name__}")
    return rows


def _read_json(path):
    def value(text, before=0):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise Problem(f"{path}:{before + error.lineno}: not JSON ({error.msg})") from None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not UTF-8 text ({error})") from None
    if path.suffix != ".json":
        lines = enumerate(text.split("\n"))
        return [(f"{path}:{i + 1}", value(line, i)) for i, line in lines if line.strip()]
    rows = value(text) if text.strip() else []
    return [(f"{path}:row {i}", row) for i, row in enumerate(rows if isinstance(rows, list) else [rows], 1)]


def _read_with_datasets(source):
    try:
        import datasets
    except ImportError:
        raise Problem(f"{source}: hub ids and parquet files need `pip install datasets`") from None
    try:
        if str(source).endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=str(source), split="train")
        else:
            splits = datasets.get_dataset_split_names(source)
            rows = datasets.load_dataset(source, split="train_prefs" if "train_prefs" in splits else "train")
    except Exception as error:  # the library raises dozens of kinds; all mean that the data could not be had
        raise Problem(f"{source}: could not be loaded ({first_line(error)})") from None
    return [(f"{source}:row {i}", row) for i, row in enumerate(rows, 1)]


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_jsonl(path, rows):
    """Write under a temporary name and rename: a file that exists is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


def read_jsonl(path):
    """The rows of a file of our own, which may be empty."""
    return [row for _, row in _read_json(Path(path))]


# ---------------------------------------------------------------- prompts and pairs
def as_messages(prompt):
    """A prompt as chat messages; plain text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_id(prompt):
    """The same text for the same conversation, whichever way it was written down."""
    return json.dumps([[m["role"], m["content"]] for m in as_messages(prompt)], ensure_ascii=False)


def by_prompt(rows):
    """The rows of one prompt after the other's, as lists; a prompt's stand next to each other."""
    for _, group in groupby(rows, key=lambda row: prompt_id(row["prompt"])):
        yield list(group)


def check_prompt(where, prompt):
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in prompt):
        if prompt[-1]["role"] == "assistant":
            raise Problem(f"{where}: the prompt ends with an assistant turn; "
                          "it must end where the answer begins")
        return prompt
    raise Problem(f"{where}: no prompt "
                  "(a field `prompt` with text, or a list of messages with role and content)")


def read_prompts(source):
    """Prompts in the order of the file, repeated ones once. Returns (prompts, number of repeats left out)."""
    rows = read_rows(source)
    unique = {}
    for where, row in rows:
        prompt = check_prompt(where, row.get("prompt"))
        unique.setdefault(prompt_id(prompt), prompt)
    return list(unique.values()), len(rows) - len(unique)


def read_pairs(source):
    """Preference pairs as dicts with `prompt`, `chosen`, `rejected` (answers as text)
    and the row's other fields.

    Takes text or messages, answers with or without the prompt in front (UltraFeedback, TRL), an explicit or
    an implicit prompt (then the turns before the last).
    """
    pairs = []
    for where, row in read_rows(source):
        chosen, rejected = row.get("chosen"), row.get("rejected")
        prompt = row.get("prompt")
        if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
            prompt = chosen[:-1]
            if prompt != rejected[:-1]:
                raise Problem(f"{where}: chosen and rejected answer different prompts")
        prompt = check_prompt(where, prompt)
        pairs.append({**row, "prompt": prompt, "chosen": _answer(where, "chosen", chosen, prompt),
                      "rejected": _answer(where, "rejected", rejected, prompt)})
    return pairs


def _answer(where, field, value, prompt):
    if isinstance(value, list) and value and isinstance(value[-1], dict) \
            and value[-1].get("role") == "assistant":
        value = value[-1].get("content")
    elif isinstance(value, str) and isinstance(prompt, str) and value.startswith(prompt) and value != prompt:
        value = value[len(prompt):]
    if not isinstance(value, str):
        raise Problem(f"{where}: no answer in `{field}` (text, or messages that end with the assistant's)")
    return value


# ---------------------------------------------------------------- chats to tokens
def load_tokenizer(folder):
    """A tokenizer with a chat template."""
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
    head = text = _render(tokenizer, messages, add_generation_prompt=True)
    if response is not None:
        # rendered with a stand-in: templates trim and rewrite contents, we train on what was really said
        answered = _render(tokenizer, [*messages, {"role": "assistant", "content": "\u241f"}])
        before, _, tail = answered.rpartition("\u241f")
        if not before.startswith(head):
            raise Problem(f"{tokenizer.name_or_path}: this chat template's generation prompt is not "
                          "the beginning of an answered chat, so the response's first token can't be found")
        between = before[len(head):]  # a space belongs to the answer; words would be put into its mouth
        text = head + (between if between.isspace() else "") + response
        content_end, text = len(text), text + tail
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


def _render(tokenizer, messages, **options):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template may refuse a role or an order of roles, in words of its own
        raise Problem(f"{tokenizer.name_or_path}: its chat template refuses {str(messages)[:80]}… "
                      f"({first_line(error)})") from None


@functools.cache
def _special_ids(tokenizer):
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


@functools.cache
def _adds_bos(tokenizer):
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def check_context(rows, model, folder):
    """A chat that is longer than the model's context, or a token that it doesn't know, is a Problem."""
    chats = [row.trunk + branch for row in rows for branch in row.branches]
    longest, highest = max(map(len, chats), default=0), max(map(max, chats), default=0)
    if longest > model.context:
        raise Problem(f"{folder}: a chat of {longest} tokens does not fit into its context of "
                      f"{model.context}; leave out long prompts or set a smaller --max_length")
    if highest >= model.config.vocab_size:
        raise Problem(f"{folder}: the tokenizer has more tokens than the model's {model.config.vocab_size}")


def quiet():
    """Whether another process shows the progress bars."""
    return os.environ.get("RANK", "0") != "0"


def seed_of(*parts):
    """A 64-bit number that depends on all parts and on nothing else (hash() differs between processes)."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")

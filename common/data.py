"""Files of rows, what their fields mean, and how a chat becomes tokens.

A row is a JSON object with `prompt` (text, or messages with role and content; text in `system` beside it is
the first message) or with `messages`, whose last answer is left out. Pairs have `chosen` and `rejected`
besides: text or messages. A row with other forms is refused, with the fields that it has.

Everything on disk is text. Policy and reward model have vocabularies and templates of their own, so ids never
travel between them: `encode_chat` is the one place where a chat becomes tokens, for both.

Left out on purpose: other forms of rows, training on earlier assistant turns, images, tools.
"""
import functools
import hashlib
import json
import os
import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from common.parallel import Problem, say

WANTED = "a field `prompt` with text, or a list of messages with role and content"
UNREAD = ("history", "tools", "conversations", "instruction", "input")  # they change what a prompt says

# ---------------------------------------------------------------- files
def read_rows(source):
    """[(where, row)] of a JSONL, JSON or parquet file or a hub id; `where` is 'file:line', for messages."""
    path, source = Path(source), str(source)
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise Problem(f"{source}: no such file")
    if path.suffix in (".jsonl", ".json"):
        rows = _read_json(path)
    elif path.suffix == ".parquet" or re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        rows = _read_with_datasets(source)
    else:
        raise Problem(f"{source}: a .jsonl, .json or .parquet file is needed, or a hub id")
    if not rows:
        raise Problem(f"{source}: empty")
    for where, row in rows:
        if not isinstance(row, dict):
            raise Problem(f"{where}: a JSON object is needed, this is {type(row).__name__}")
    return rows

def _read_json(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not UTF-8 text ({error})") from None
    if path.suffix == ".json":
        rows = from_json(text, path) if text.strip() else []
        rows = rows if isinstance(rows, list) else [rows]
        return [(f"{path}:row {number}", row) for number, row in enumerate(rows, 1)]
    return [(f"{path}:{number}", from_json(line, path, number))
            for number, line in enumerate(text.split("\n"), 1) if line.strip()]

def _read_with_datasets(source):
    try:
        import datasets
        if source.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=source, split="train")
        else:
            splits = datasets.get_dataset_split_names(source)
            rows = datasets.load_dataset(source, split="train_prefs" if "train_prefs" in splits else "train")
    except ImportError:
        raise Problem(f"{source}: hub ids and parquet files need `pip install datasets`") from None
    except Exception as error:  # the library raises dozens of kinds; all mean that the data could not be had
        raise Problem(f"{source}: could not be loaded ({first_line(error)})") from None
    return [(f"{source}:row {number}", row) for number, row in enumerate(rows, 1)]

def from_json(text, path, line=1):
    """The value of a JSON text, which begins in this line of the file `path`."""
    try:
        value = json.loads(text)
        if "\\u" in text or text.count("[") + text.count("{") > 100:
            json.dumps(value, ensure_ascii=False).encode()  # fails where it could not be written again
        return value
    except (ValueError, RecursionError) as error:
        where = f"{path}:{line + getattr(error, 'lineno', 1) - 1}"
        raise Problem(f"{where}: not JSON that can be read ({first_line(error)})") from None

def read_json(path):
    """The object that a JSON file holds."""
    value = from_json(Path(path).read_text(encoding="utf-8", errors="replace"), path)
    if not isinstance(value, dict):
        raise Problem(f"{path}: a JSON object is needed, this is {type(value).__name__}")
    return value

def read_jsonl(path):
    """The rows of a file that this project wrote; it may be empty."""
    return [row for _, row in _read_json(Path(path))]

def write_text(path, text):
    """Write under a temporary name and rename: a file that exists is whole. For one process."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)

def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

def first_line(error):
    """An exception of a library as one line without control characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    if "above report" in text:  # transformers logs the report where nobody looks
        return "its weights have other shapes than config.json says"
    return " ".join(text.split())[:300] or type(error).__name__

# ---------------------------------------------------------------- what fields mean
def is_number(value):
    """NaN, infinities, true and what would overflow in a sum of squares are none."""
    return type(value) in (int, float) and abs(value) <= 1e100

TEXT = ("text", lambda value: isinstance(value, str))
FIELDS = {"response": TEXT, "chosen": TEXT, "rejected": TEXT, "subset": TEXT,
          "tokens": ("a whole number from 0", lambda value: type(value) is int and 0 <= value < 2**31),
          "finished": ("true or false", lambda value: type(value) is bool),
          "score": ("a finite number", is_number),
          "weight": ("a finite number from 0", lambda value: is_number(value) and value >= 0)}

def check_field(where, row, name):
    """row[name], if it is what FIELDS says of the name's last word."""
    value, (wanted, fits) = row.get(name), FIELDS[name.rpartition("_")[2]]
    if value is None:
        hint = "; score samples first: python reward.py --samples" * (name == "score")
        raise Problem(f"{where}: no {name} (a field `{name}` with {wanted}){hint}")
    if not fits(value):
        raise Problem(f"{where}: the {name} {value!r:.60} is not {wanted}")
    return value

def as_messages(prompt):
    """A prompt as chat messages; plain text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

def prompt_id(prompt):
    """The same text for the same conversation, whichever way it was written down."""
    return json.dumps([[m["role"], m["content"]] for m in as_messages(prompt)], ensure_ascii=False)

def by_prompt(rows):
    """The rows of one prompt after the other's, as lists; the rows of a prompt stand next to each other."""
    for _, group in groupby(rows, key=lambda row: prompt_id(row["prompt"])):
        yield list(group)

def is_chat(value):
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value)

def prompt_of(where, row):
    """The prompt of a row of a user's file: text or messages."""
    unread = [name for name in UNREAD if row.get(name)]
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("messages") or row.get("chosen"), list):
        prompt = row.get("messages") or row["chosen"]
        while is_chat(prompt) and prompt[-1]["role"] == "assistant":  # what it says is an answer
            prompt = prompt[:-1]
    if prompt is None or unread:
        problem = f"{', '.join(unread)} can't be read" if unread else "no prompt"
        raise Problem(f"{where}: {problem}; the row has {', '.join(row)}; wanted is {WANTED}"[:400])
    if row.get("system") and is_chat(as_messages(prompt)):
        if not isinstance(row["system"], str) or as_messages(prompt)[0]["role"] == "system":
            raise Problem(f"{where}: `system` is not text, or stands beside a system turn; write one of them")
        prompt = [{"role": "system", "content": row["system"]}, *as_messages(prompt)]
    return check_prompt(where, prompt)

def check_prompt(where, prompt):
    messages = as_messages(prompt)
    if not is_chat(messages) or not any(m["content"].strip() for m in messages):
        raise Problem(f"{where}: no prompt; wanted is {WANTED}")
    if messages[-1]["role"] == "assistant":
        raise Problem(f"{where}: the prompt ends with an assistant turn; it must end where the answer begins")
    return prompt

def read_prompts(source):
    """Prompts in the order of the file, repeated ones once; and how many repeats were left out."""
    rows, unique = read_rows(source), {}
    for where, row in rows:
        prompt = prompt_of(where, row)
        unique.setdefault(prompt_id(prompt), prompt)
    return list(unique.values()), len(rows) - len(unique)

def read_pairs(source):
    """Preference pairs: rows with `prompt`, and `chosen` and `rejected` as text. In the file these are text,
    or messages with or without the prompt's in front (UltraFeedback, TRL)."""
    pairs, equal, in_front = [], 0, 0
    for where, row in read_rows(source):
        row = {name: value for name, value in row.items() if value is not None}  # parquet fills up with null
        prompt = prompt_of(where, row)
        for name in {"weight", "subset", "chosen_finished", "rejected_finished"} & row.keys():
            check_field(where, row, name)
        answers = {side: answer_of(where, row, side, prompt) for side in ("chosen", "rejected")}
        pairs.append({**row, "prompt": prompt, **answers})
        equal += answers["chosen"] == answers["rejected"] or not all(map(str.strip, answers.values()))
        in_front += isinstance(prompt, str) and all(text.startswith(prompt) for text in answers.values())
    for count, what in (equal, "equal or empty answers"), (in_front, "the prompt in front of both answers"):
        if count:
            say(f"WARNING: {source}: {count} of {len(pairs)} pairs have {what}")
    return pairs

def answer_of(where, row, side, prompt):
    def turns(chat):
        return [(m["role"], m["content"].strip()) for m in as_messages(chat)]
    value, asked = row.get(side), turns(prompt)
    if is_chat(value) and value[-1]["role"] == "assistant":
        if value[:-1] and turns(value[:-1]) not in (asked, asked[asked[0][0] == "system":]):
            raise Problem(f"{where}: the messages of `{side}` answer another prompt than the row's")
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise Problem(f"{where}: no answer in `{side}` (text, or messages that end with the assistant's)")
    return value

def read_samples(source, *fields):
    """The rows of a file of responses: each with its prompt and these fields."""
    rows = read_rows(source)
    for where, row in rows:
        check_prompt(where, row.get("prompt"))
        for name in fields:
            check_field(where, row, name)
    return [row for _, row in rows]

def seed_of(*parts):
    """A 64-bit number that depends on all parts and on nothing else (hash() differs between processes)."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")

# ---------------------------------------------------------------- chats to tokens
def load_tokenizer(folder):
    """A fast tokenizer with a chat template and an EOS token; without them it is a Problem."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise Problem(f"{folder}: no tokenizer could be loaded ({first_line(error)})") from None
    if not tokenizer.chat_template:
        raise Problem(f"{folder}: the tokenizer has no chat template (add chat_template.jinja to the folder)")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise Problem(f"{folder}: a fast tokenizer (tokenizer.json) with an EOS token is needed")
    tokenizer.backend_tokenizer.no_truncation()  # a saved limit would cut chats in silence
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer

class Chat(NamedTuple):
    ids: list   # tokens of prompt and response
    start: int  # index of the response's first token

def encode_chat(tokenizer, prompt, response=None, finished=True, whole=False):
    """Tokens of a chat, with exactly one BOS where the tokenizer uses one.

    Without a response the chat ends where the assistant begins, ready for sampling. A finished response ends
    in the template's stop token (EOS where the template has none), exactly once; an unfinished one ends in
    its last word. whole: with all that the template writes after the stop token, as reward models were
    trained to read it.
    """
    messages, special = as_messages(prompt), Special(tokenizer)
    said = [str(value) for message in messages for value in message.values()] + [response or ""]
    literal = any(map(special.texts.search, said))
    head = text = render(tokenizer, messages, literal, add_generation_prompt=True)
    if response is not None:
        # The template gets a stand-in for the response: templates trim and rewrite what they are given, and
        # training is on what was really said.
        answered = render(tokenizer, [*messages, {"role": "assistant", "content": "\u241f"}], literal)
        before, _, tail = answered.rpartition("\u241f")
        if not before.startswith(head):
            raise Problem(f"{tokenizer.name_or_path}: this chat template's generation prompt is not "
                          "the beginning of an answered chat, so the response's first token can't be found")
        between = before[len(head):]  # a space belongs to the answer; words would be put into its mouth
        text = head + (between if between.isspace() else "") + response
        content_end, text = len(text), text + tail
    backend = special.twin if literal else tokenizer.backend_tokenizer
    encoded = backend.encode(text, add_special_tokens=False)
    ids, offsets = encoded.ids, encoded.offsets
    if ids[:1] != special.bos:
        ids, offsets = special.bos + ids, [(0, 0)] * len(special.bos) + offsets
    if response is None:
        return Chat(ids, len(ids))
    start = next((i for i, (_, end) in enumerate(offsets) if end > len(head)), len(ids))
    last = next((i for i, (begin, _) in enumerate(offsets) if i >= start and begin >= content_end), len(ids))
    stop = next((i for i in range(last, len(ids)) if ids[i] in special.ids), None)
    if not finished:
        ids = ids[:last]
    elif stop is None:
        ids = ids[:last] + [tokenizer.eos_token_id]
    elif not whole:
        ids = ids[:last] + [ids[stop]]
    return Chat(ids, min(start, last))

def render(tokenizer, messages, literal, **options):
    special = Special(tokenizer)
    try:
        shown = special.hide(messages) if literal else messages
        text = tokenizer.apply_chat_template(shown, tokenize=False, **options)
        if not text.strip():
            raise ValueError("it writes nothing")
        return special.reveal(text) if literal else text
    except Exception as error:  # a template may refuse a role or an order of roles, in words of its own
        raise Problem(f"{tokenizer.name_or_path}: its chat template refuses {str(messages)[:80]}… "
                      f"({first_line(error)})") from None

@functools.lru_cache(4)  # each phase loads a tokenizer of its own
class Special:
    """A tokenizer's special tokens: their ids, a pattern of their texts, and [BOS] where it begins with it.

    One that somebody spells in a chat ("</s>" in a user's text) is text like any other, and ends no turn. For
    such chats those that the template writes get secret names, and the tokenizer has a twin which knows them
    by these names alone: `hide` what is said from the template, `reveal` it in what the template wrote, and
    let the twin encode that.
    """
    def __init__(self, tokenizer):
        tokens = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.tokenizer, self.ids = tokenizer, {*tokenizer.all_special_ids, *tokens}
        self.spelled = sorted(tokens.values(), key=len, reverse=True)
        self.texts = re.compile("|".join(map(re.escape, self.spelled)) or "(?!)")
        self.bos = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
        self.secret = os.urandom(8).hex()

    @functools.cached_property
    def twin(self):
        state = self.tokenizer.backend_tokenizer.to_str()
        for text in self.spelled:  # in its vocabulary, and wherever else it stands
            state = state.replace(*(json.dumps(t, ensure_ascii=False) for t in (text, self.name(text))))
        try:
            return Tokenizer.from_str(state)
        except Exception as error:
            raise Problem(f"{self.tokenizer.name_or_path}: a chat spells a special token, and this tokenizer "
                          f"can't tell it from a real one ({first_line(error)})") from None

    def name(self, text, kind="real"):
        return self.texts.sub(lambda it: f"\ue000{self.secret}{kind}{it[0].encode().hex()}\ue001", text)

    def hide(self, messages):
        return [{key: self.name(value, "said") if isinstance(value, str) else value
                 for key, value in message.items()} for message in messages]

    def reveal(self, text):
        said = f"\ue000{self.secret}said(.*?)\ue001"
        return re.sub(said, lambda it: bytes.fromhex(it[1]).decode(), self.name(text))

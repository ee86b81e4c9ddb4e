"""Files of rows, the meaning of their fields, and the one function that turns a chat into tokens.

A row is a JSON object. Its prompt stands in `prompt`, as text or as messages with role and content, or in
`messages`, of which a last answer is left out. A text in `system` becomes the first message. Pairs also have
`chosen` and `rejected`, as text or as messages. Rows of any other form are refused.

Files hold text, never tokens. The policy and the reward model have vocabularies and templates of their own,
and `encode_chat` turns a chat into tokens for both.

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
UNREAD = ("history", "tools", "conversations", "instruction", "input")  # fields that change the prompt

# ---------------------------------------------------------------- files
def read_rows(source):
    """Read a JSONL, JSON or parquet file or a hub id -> [(where, row)]. where is 'file:line'."""
    path, source = Path(source), str(source)
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise Problem(f"{source}: no such file")
    if path.suffix in (".jsonl", ".json"):
        rows = _read_json(path)
    elif path.suffix == ".parquet" or re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        rows = _read_with_datasets(source)
    else:
        raise Problem(f"{source}: neither a .jsonl, .json or .parquet file nor a hub id")
    if not rows:
        raise Problem(f"{source}: empty")
    for where, row in rows:
        if not isinstance(row, dict):
            raise Problem(f"{where}: a row must be a JSON object, but this is {type(row).__name__}")
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
    except Exception as error:  # the library raises dozens of kinds of errors
        raise Problem(f"{source}: could not be loaded ({first_line(error)})") from None
    return [(f"{source}:row {number}", row) for number, row in enumerate(rows, 1)]

def from_json(text, path, line=1):
    """The value of a JSON text. path, line: where the text begins, for the error message."""
    try:
        value = json.loads(text)
        if "\\u" in text or text.count("[") + text.count("{") > 100:
            json.dumps(value, ensure_ascii=False).encode()  # fails if the value can't be written to a file
        return value
    except (ValueError, RecursionError) as error:
        where = f"{path}:{line + getattr(error, 'lineno', 1) - 1}"
        raise Problem(f"{where}: not readable JSON ({first_line(error)})") from None

def read_json(path):
    """The object in a JSON file."""
    value = from_json(Path(path).read_text(encoding="utf-8", errors="replace"), path)
    if not isinstance(value, dict):
        raise Problem(f"{path}: it must hold a JSON object, but this is {type(value).__name__}")
    return value

def read_jsonl(path):
    """The rows of a file that this project has written. There may be none."""
    return [row for _, row in _read_json(Path(path))]

def write_text(path, text):
    """Write to a temporary name and rename it, so that a file that exists is complete. For one process."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)

def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

def first_line(error):
    """The message of a library's exception, as one line without control characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    if "above report" in text:  # a report that transformers writes to its log, which is silenced
        return "its weights have other shapes than config.json says"
    return " ".join(text.split())[:300] or type(error).__name__

# ---------------------------------------------------------------- what fields mean
def is_number(value):
    """Whether a value is a finite number, and small enough to be squared and summed."""
    return type(value) in (int, float) and abs(value) <= 1e100

TEXT = ("text", lambda value: isinstance(value, str))
FIELDS = {"response": TEXT, "chosen": TEXT, "rejected": TEXT, "subset": TEXT,
          "tokens": ("a whole number from 0", lambda value: type(value) is int and 0 <= value < 2**31),
          "finished": ("true or false", lambda value: type(value) is bool),
          "score": ("a finite number", is_number),
          "weight": ("a finite number from 0", lambda value: is_number(value) and value >= 0)}

def check_field(where, row, name):
    """Return row[name]. Raise a Problem if it is not what FIELDS says about the last word of the name."""
    value, (wanted, fits) = row.get(name), FIELDS[name.rpartition("_")[2]]
    if value is None:
        hint = "; score samples first: python reward.py --samples" * (name == "score")
        raise Problem(f"{where}: no {name} (a field `{name}` with {wanted}){hint}")
    if not fits(value):
        raise Problem(f"{where}: the {name} {value!r:.60} is not {wanted}")
    return value

def as_messages(prompt):
    """A prompt as chat messages. A text is one turn of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

def prompt_id(prompt):
    """A text that is the same for the same conversation, whether it is given as text or as messages."""
    return json.dumps([[m["role"], m["content"]] for m in as_messages(prompt)], ensure_ascii=False)

def by_prompt(rows):
    """Yield the rows of each prompt as a list. The rows of a prompt must stand next to each other."""
    for _, group in groupby(rows, key=lambda row: prompt_id(row["prompt"])):
        yield list(group)

def is_chat(value):
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value)

def prompt_of(where, row):
    """The prompt in a row of a user's file, as text or messages. Raises a Problem if there is none."""
    unread = [name for name in UNREAD if row.get(name)]
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("messages") or row.get("chosen"), list):
        prompt = row.get("messages") or row["chosen"]
        while is_chat(prompt) and prompt[-1]["role"] == "assistant":  # the answer
            prompt = prompt[:-1]
    if prompt is None or unread:
        problem = f"{', '.join(unread)} can't be read" if unread else "no prompt"
        raise Problem(f"{where}: {problem}; the row has {', '.join(row)}; wanted is {WANTED}"[:400])
    if row.get("system") and is_chat(as_messages(prompt)):
        if not isinstance(row["system"], str) or as_messages(prompt)[0]["role"] == "system":
            raise Problem(f"{where}: `system` must be text, and the only system turn of the prompt")
        prompt = [{"role": "system", "content": row["system"]}, *as_messages(prompt)]
    return check_prompt(where, prompt)

def check_prompt(where, prompt):
    messages = as_messages(prompt)
    if not is_chat(messages) or not any(m["content"].strip() for m in messages):
        raise Problem(f"{where}: no prompt; wanted is {WANTED}")
    if messages[-1]["role"] == "assistant":
        raise Problem(f"{where}: the prompt must end where the answer begins, not with an assistant turn")
    return prompt

def read_prompts(source):
    """Read prompts -> (the different prompts in the order of the file, how many repeats were left out)."""
    rows, unique = read_rows(source), {}
    for where, row in rows:
        prompt = prompt_of(where, row)
        unique.setdefault(prompt_id(prompt), prompt)
    return list(unique.values()), len(rows) - len(unique)

def read_pairs(source):
    """Read preference pairs -> rows with `prompt`, and with `chosen` and `rejected` as text. In the file the
    answers may be messages, with or without those of the prompt in front (UltraFeedback, TRL)."""
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
            raise Problem(f"{where}: the messages in `{side}` don't begin with those of the row's prompt")
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise Problem(f"{where}: no answer in `{side}` (text, or messages that end with the assistant's)")
    return value

def read_samples(source, *fields):
    """Read a file of responses -> its rows. Each has a prompt and `fields`, or a Problem is raised."""
    rows = read_rows(source)
    for where, row in rows:
        check_prompt(where, row.get("prompt"))
        for name in fields:
            check_field(where, row, name)
    return [row for _, row in rows]

def seed_of(*parts):
    """A 64-bit number from a hash of the parts. Python's hash() would differ between processes."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")

# ---------------------------------------------------------------- chats to tokens
def load_tokenizer(folder):
    """Load a tokenizer. Raise a Problem if it is not a fast one, or has no chat template or no EOS token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise Problem(f"{folder}: no tokenizer could be loaded ({first_line(error)})") from None
    if not tokenizer.chat_template:
        raise Problem(f"{folder}: the tokenizer has no chat template (add chat_template.jinja to the folder)")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise Problem(f"{folder}: a fast tokenizer (tokenizer.json) with an EOS token is needed")
    tokenizer.backend_tokenizer.no_truncation()  # a limit saved with it would cut chats in silence
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer

class Chat(NamedTuple):
    ids: list   # the tokens of prompt and response
    start: int  # the index of the first token of the response

def encode_chat(tokenizer, prompt, response=None, finished=True, whole=False):
    """The tokens of a chat, with one BOS if the tokenizer uses one.

    Without a response the chat ends where the assistant's answer begins, ready for sampling. A finished
    response is followed by one stop token, that of the template, or EOS if the template writes none. whole:
    keep what the template writes after the stop token, as reward models were trained to read it.
    """
    messages, special = as_messages(prompt), Special(tokenizer)
    said = [str(value) for message in messages for value in message.values()] + [response or ""]
    literal = any(map(special.texts.search, said))
    head = text = render(tokenizer, messages, literal, add_generation_prompt=True)
    if response is not None:
        # Templates trim and rewrite answers, but training must be on what was really said. So the template
        # gets a placeholder, which is then replaced by the response.
        answered = render(tokenizer, [*messages, {"role": "assistant", "content": "\u241f"}], literal)
        before, _, tail = answered.rpartition("\u241f")
        if not before.startswith(head):
            raise Problem(f"{tokenizer.name_or_path}: its chat template writes other text before an answer "
                          "than its generation prompt, so the answer's first token can't be found")
        between = before[len(head):]  # keep a space before the answer, but no words that it did not say
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
    except Exception as error:  # templates raise errors of their own, for example at two user turns
        raise Problem(f"{tokenizer.name_or_path}: its chat template fails at {str(messages)[:80]}… "
                      f"({first_line(error)})") from None

@functools.lru_cache(4)
class Special:
    """The special tokens of a tokenizer: their ids, a pattern that finds their texts, and [BOS] or [].

    If a user writes "</s>", this is text like any other and must not become a stop token. In such a chat the
    special tokens that the template writes are renamed to secret texts, and `twin` is a copy of the tokenizer
    that knows them by these names alone. `hide` marks what was said before the template sees it. `reveal`
    renames the special tokens in what the template wrote and restores what was said.
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
        for text in self.spelled:  # in the vocabulary, and anywhere else in the file
            state = state.replace(*(json.dumps(t, ensure_ascii=False) for t in (text, self.name(text))))
        try:
            return Tokenizer.from_str(state)
        except Exception as error:
            raise Problem(f"{self.tokenizer.name_or_path}: a chat has the text of a special token, and this "
                          f"tokenizer can't tell it from a real one ({first_line(error)})") from None

    def name(self, text, kind="real"):
        return self.texts.sub(lambda it: f"\ue000{self.secret}{kind}{it[0].encode().hex()}\ue001", text)

    def hide(self, messages):
        return [{key: self.name(value, "said") if isinstance(value, str) else value
                 for key, value in message.items()} for message in messages]

    def reveal(self, text):
        said = f"\ue000{self.secret}said(.*?)\ue001"
        return re.sub(said, lambda it: bytes.fromhex(it[1]).decode(), self.name(text))

"""Files of rows, the meaning of their fields, and the one function that turns a chat into tokens.

A row is a JSON object. Its prompt stands in `prompt`, as text or as messages with role and content, or in
`messages`, of which a last answer is left out. A text in `system` becomes the first message. Pairs also have
`chosen` and `rejected`, as text or as messages. Rows of any other form are refused. Files hold text, since
policy and reward model have vocabularies of their own. But a sample whose text does not give back the tokens
that were drawn has these, too (`sample_fields`), and the policy is trained on them.

Left out on purpose: other forms of rows, training on earlier assistant turns, images, tools.
"""
import functools
import hashlib
import json
import os
import re
from contextlib import contextmanager
from datetime import datetime
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from common.parallel import Problem, say

SIDES = ("chosen", "rejected")
MESSAGES = re.compile(r"\s*(array\()?\[?\s*\{\s*[\"'](role|content|from|value)[\"']\s*:")  # as text
PAIR_FIELDS = {"weight", *(f"{side}_{name}" for side in SIDES for name in ("finished", "ids", "tokenizer"))}
WANTED = "a field `prompt` with text, or a list of messages with role and content (text, not parts)"
UNREAD = ("history tools conversations conversation instruction input context documents image images videos "
          "system_prompt system_message chat_template_kwargs").split()  # fields that change the prompt

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
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    objects = len(lines) > 1 and all(line.strip()[0] + line.strip()[-1] == "{}" for _, line in lines)
    if path.suffix == ".jsonl" or objects:  # JSON Lines are often called .json
        return [(f"{path}:{number}", from_json(line, path, number)) for number, line in lines]
    rows = from_json(text, path) if lines else []
    return [(f"{path}:row {number}", row) for number, row in enumerate(
        rows if isinstance(rows, list) else [rows], 1)]

def _read_with_datasets(source):
    try:
        import datasets
    except ImportError:
        raise Problem(f"{source}: hub ids and parquet files need `pip install datasets`") from None
    with refusing(f"{source}: could not be loaded"):
        if source.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=source, split="train")
        else:
            splits = datasets.get_dataset_split_names(source)
            rows = datasets.load_dataset(source, split="train_prefs" if "train_prefs" in splits else "train")
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
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))

def first_line(error):
    """The message of a library's exception, as one line without control characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    if "above report" in text:  # a report that transformers writes to its log, which is silenced
        return "its weights have other shapes than config.json says"
    return " ".join(text.split())[:300] or type(error).__name__

@contextmanager
def refusing(what):
    """Raise a Problem instead of any error inside. It says `what` is wrong, and in brackets the error."""
    try:
        yield
    except Exception as error:  # libraries raise dozens of kinds
        raise Problem(f"{what} ({first_line(error)})") from None

# ---------------------------------------------------------------- what fields mean
def is_number(value):
    """Whether a value is a finite number, and small enough to be squared and summed."""
    return type(value) in (int, float) and abs(value) <= 1e100

def is_token(value):
    return type(value) is int and 0 <= value < 2**31

TEXT = ("text", lambda value: isinstance(value, str))
FIELDS = {"response": TEXT, "tokenizer": TEXT,
          "ids": ("a list of token ids", lambda value: isinstance(value, list) and all(map(is_token, value))),
          "tokens": ("a whole number from 0", is_token),
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
    return json.dumps([[m["role"], m["content"], *sorted(str(item) for item in m.items() if item[0] not in (
        "role", "content"))] for m in as_messages(prompt)], ensure_ascii=False)

def by_prompt(rows):
    """Yield the rows of each prompt as a list. The rows of a prompt must stand next to each other."""
    for _, group in groupby(rows, key=lambda row: prompt_id(row["prompt"])):
        yield list(group)

def is_chat(value):
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value)

def prompt_of(where, row):
    """The prompt in a row of a user's file, as text or messages. Raises a Problem if it can't be read."""
    unread = [name for name in UNREAD if row.get(name)]
    name = next((name for name in ("prompt", "messages", "chosen") if row.get(name) is not None), "prompt")
    prompt = row.get(name)
    if unread or prompt is None or name != "prompt" and not isinstance(prompt, list):
        problem = f"{', '.join(unread)} can't be read" if unread else "no prompt that can be read"
        raise Problem(f"{where}: {problem}; the row has {', '.join(row)}; wanted is {WANTED}"[:400])
    while name != "prompt" and is_chat(prompt) and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]  # the answer
    if row.get("system") and is_chat(as_messages(prompt)):
        if not isinstance(row["system"], str) or as_messages(prompt)[0]["role"] == "system":
            raise Problem(f"{where}: `system` must be text, and the only system turn of the prompt")
        prompt = [{"role": "system", "content": row["system"]}, *as_messages(prompt)]
    return check_prompt(where, prompt)

def check_prompt(where, prompt):
    messages = as_messages(prompt)
    if not is_chat(messages) or not any(m["content"].strip() for m in messages):
        raise Problem(f"{where}: the prompt {prompt!r:.80} can't be read; wanted is {WANTED}")
    if isinstance(prompt, str) and MESSAGES.match(prompt):
        raise Problem(f"{where}: the prompt is messages that are written as text; write them as JSON")
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
        for name in PAIR_FIELDS & row.keys():
            check_field(where, row, name)
        answers = {side: answer_of(where, row, side, prompt) for side in SIDES}
        if all(map(MESSAGES.match, answers.values())):
            raise Problem(f"{where}: the answers are messages that are written as text; write them as JSON")
        pairs.append({**row, "prompt": prompt, **answers})
        equal += answers["chosen"] == answers["rejected"] or not all(map(str.strip, answers.values()))
        in_front += isinstance(prompt, str) and all(text.startswith(prompt) for text in answers.values())
    if equal:
        say(f"WARNING: {source}: {equal} of {len(pairs)} pairs have equal or empty answers")
    if in_front >= 10:
        say(f"WARNING: {source}: in {in_front} of {len(pairs)} pairs both answers begin with the prompt; if "
            "it was put in front of them, take it away")
    return pairs

def answer_of(where, row, side, prompt):
    def turns(chat):
        return [(m["role"], m["content"].strip()) for m in as_messages(chat)]
    value, asked = [row[side]] if isinstance(row.get(side), dict) else row.get(side), turns(prompt)
    if is_chat(value) and value[-1]["role"] == "assistant":
        if value[:-1] and turns(value[:-1]) not in (asked, asked[asked[0][0] == "system":]):
            raise Problem(f"{where}: the messages in `{side}` don't begin with those of the row's prompt")
        more = [key for key, item in value[-1].items() if item and key not in ("role", "content", "name")]
        if more:
            raise Problem(f"{where}: the answer in `{side}` has {', '.join(more)}, which can't be read")
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise Problem(f"{where}: `{side}` must be text, or messages (text, not parts) that end with the "
                      f"assistant's, and not {value!r:.80}")
    return value

def read_samples(source, *fields):
    """Read a file of responses -> its rows. Each has a prompt and `fields`, or a Problem is raised."""
    rows = read_rows(source)
    for where, row in rows:
        row["prompt"] = prompt_of(where, row)
        for name in fields:
            check_field(where, row, name)
    return [row for _, row in rows]

def seed_of(*parts):
    """A 64-bit number from a hash of the parts. Python's hash() would differ between processes."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")

# ---------------------------------------------------------------- chats to tokens
def load_tokenizer(folder):
    """Load a tokenizer. Raise a Problem if it is not a fast one, or has no chat template or no EOS token."""
    with refusing(f"{folder}: no tokenizer could be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise Problem(f"{folder}: the tokenizer has no chat template (add chat_template.jinja to the folder)")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise Problem(f"{folder}: a fast tokenizer (tokenizer.json) with an EOS token is needed")
    tokenizer.backend_tokenizer.no_truncation()  # a limit saved with it would cut chats in silence
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer

# Some templates write today's date. They get this one, or a command would give other tokens tomorrow.
chat_template_utils.datetime = SimpleNamespace(now=lambda: datetime(2024, 7, 26))

def encode_chat(tokenizer, prompt, response=None):
    """The tokens of a chat as its template writes it, with one BOS if the tokenizer uses one. A special token
    that is spelled in a message ("</s>") is text like any other: it is marked, and encoded by itself as text.

    Without a response the chat ends where the answer begins, and policies sample what follows, or are trained
    on `encode_response`. With a response it is what reward models read: the whole chat, with EOS at its end
    if the template writes no stop token. For example, with the template of Zephyr,

        encode_chat(t, "Hi")           <|user|>⏎Hi</s>⏎<|assistant|>⏎
        encode_response(t, "Hello")    Hello</s>
        encode_chat(t, "Hi", "Hello")  <|user|>⏎Hi</s>⏎<|assistant|>⏎Hello</s>⏎
    """
    answer = [] if response is None else [{"role": "assistant", "content": response}]
    facts, messages = facts_of(tokenizer), [*as_messages(prompt), *answer]
    marked = [{key: facts.spelled.sub(facts.mark + r"\g<0>" + facts.mark, value) if isinstance(value, str)
               else value for key, value in message.items()} for message in messages]
    pieces, ids = write_chat(tokenizer, marked, add_generation_prompt=not answer).split(facts.mark), []
    if len(pieces) % 2 == 0 or not all(map(facts.spelled.fullmatch, pieces[1::2])):
        raise Problem(f"{tokenizer.name_or_path}: its template takes apart a special token in a message")
    for number, piece in enumerate(pieces):
        ids += text_ids(tokenizer, piece) if number % 2 else tokenizer.encode(piece, add_special_tokens=False)
    ids = ids if ids[:1] == facts.bos else facts.bos + ids
    return ids + [tokenizer.eos_token_id] * (bool(answer) and not facts.writes_stop)

def write_chat(tokenizer, messages, **options):
    """What the chat template writes. Raises a Problem if it fails, as some do at two user turns."""
    with refusing(f"{tokenizer.name_or_path}: its chat template fails at {str(messages)[:80]}…"):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    if not text.strip():
        raise Problem(f"{tokenizer.name_or_path}: its chat template writes nothing")
    return text

def text_ids(tokenizer, text):
    """The tokens of a text with its special tokens as text, or a Problem if the tokenizer can't do that."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if facts_of(tokenizer).special.intersection(ids):
        raise Problem(f"{tokenizer.name_or_path}: a message has the text of a special token, which this "
                      f"tokenizer can't tell from a real one: {text[:60]!r}")
    return ids

def encode_response(tokenizer, text, finished=True):
    """The tokens of a policy's response. A finished one ends with the token with which the template ends an
    answer, or with EOS if the template writes none."""
    return text_ids(tokenizer, text) + [facts_of(tokenizer).stop] * finished

def sample_fields(tokenizer, ids, finished):
    """The fields of a response of which the tokens `ids` were drawn. They are kept, with a digest of the
    tokenizer, if the text does not give them back. It has all special tokens but the stop, as text."""
    said, facts = ids[:len(ids) - finished], facts_of(tokenizer)
    text = tokenizer.decode(said, clean_up_tokenization_spaces=False)
    plain = not facts.special.intersection(said) and encode_response(tokenizer, text, finished) == ids
    kept = {} if plain else dict(ids=ids, tokenizer=facts.digest)
    return dict(response=text, tokens=len(ids), finished=finished) | kept

def response_ids(tokenizer, pair, side):
    """The tokens of a pair's answer: those that were drawn, if they are of this tokenizer and this text."""
    ids, finished = pair.get(f"{side}_ids"), pair.get(f"{side}_finished", True)
    drawn = ids and pair.get(f"{side}_tokenizer") == facts_of(tokenizer).digest
    return ids if drawn and sample_fields(tokenizer, ids, finished)["response"] == pair[side] else (
        encode_response(tokenizer, pair[side], finished))

def stop_tokens(folder, tokenizer):
    """The ids at which a response ends: those in generation_config.json or, if it has none, in config.json,
    the tokenizer's EOS, and the token with which the chat template ends an answer."""
    paths = [Path(folder) / name for name in ("generation_config.json", "config.json")]
    found = [(path, read_json(path).get("eos_token_id")) for path in paths if path.exists()]
    path, ids = next(((path, ids) for path, ids in found if ids is not None), (folder, []))
    ids, stop = ids if isinstance(ids, list) else [ids], facts_of(tokenizer).stop
    if not all(map(is_token, ids)):
        raise Problem(f"{path}: eos_token_id {ids!r:.40} is neither a token id nor a list of them")
    if stop not in (tokenizer.eos_token_id, *ids):
        say(f"{folder}: responses also end at {tokenizer.convert_ids_to_tokens(stop)}, with which the chat "
            "template ends an answer")
    return {tokenizer.eos_token_id, *ids, stop}

@functools.lru_cache(8)
def facts_of(tokenizer):
    """bos: [the BOS that the tokenizer adds] or []; stop: the token by which the template ends an answer, or
    EOS; writes_stop: whether it does; special: ids that no text should give; spelled: a pattern of the texts
    of special tokens; mark: a secret text to mark them in messages; digest: of the vocabulary."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\u241f"}]
    text = write_chat(tokenizer, chat)
    after = tokenizer(text.rpartition("\u241f")[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    special = {i: token.content for i, token in added.items() if token.special}
    stops = [i for i in after if i in special] or [
        i for i in after if i in added and added[i].content.strip()]
    return SimpleNamespace(
        bos=[i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id],
        stop=[*stops, tokenizer.eos_token_id][0], writes_stop=bool(stops),
        special={*special} - {tokenizer.pad_token_id, tokenizer.unk_token_id} | {tokenizer.eos_token_id},
        spelled=re.compile("|".join(map(re.escape, sorted(special.values(), key=len)[::-1])) or "(?!)"),
        mark=f"\ue000{os.urandom(8).hex()}\ue000",
        digest=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16])

"""Files of rows: read and checked line by line, written whole or not at all.

A user's JSON passes `from_json`, and a field that has a meaning passes `check_field`: what is wrong is a
Problem with its file and line, before anything is computed.
"""
import csv
import gzip
import io
import json
import os
import re
import zlib
from array import array
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate, chain
from mmap import ACCESS_READ, mmap
from pathlib import Path


class Problem(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


PROMPTS = ("prompt", "messages", "conversations", "instruction", "question", "chosen")
ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}


def read_rows(source):
    """[(where, row)] of a JSONL, JSON or parquet file or a hub id; `where` is 'file:line', for messages."""
    path = Path(source)
    if path.is_dir():
        raise Problem(f"{source}: a folder; a JSONL, JSON or parquet file is needed")
    if path.suffix == ".parquet" or not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) \
            and path.suffix not in (".json", ".jsonl", ".csv", ".gz"):
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
    packed = path.suffix == ".gz"
    try:
        text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not UTF-8 text ({error})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Problem(f"{path}: not a whole gzip file ({error})") from None
    suffix = Path(path.stem).suffix if packed else path.suffix
    if suffix == ".csv":
        return _read_csv(text, path)
    if suffix != ".json":
        lines = enumerate(line[0] for line in re.finditer("(?m)^.*", text))  # no second copy of the text
        return [(f"{path}:{i + 1}", from_json(line, path, i)) for i, line in lines if line.strip()]
    rows = from_json(text, path) if text.strip() else []
    return [(f"{path}:row {i}", row) for i, row in enumerate(rows if isinstance(rows, list) else [rows], 1)]


def _read_csv(text, path):
    csv.field_size_limit(2**31 - 1)
    try:
        rows = [*csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    except csv.Error as error:
        raise Problem(f"{path}: not CSV ({error})") from None
    for i, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise Problem(f"{path}:row {i}: not as many values as the first line has names")
    return [(f"{path}:row {i}", row) for i, row in enumerate(rows, 1)]


def prompt_of(where, row, field=""):
    """(prompt, the field that it was found in). Of a chat under another name than `prompt` the assistant's
    last turns are left out: they are an answer; an empty one, as HH's prompts end with, under any name."""
    field = field or next((name for name in PROMPTS if row.get(name) is not None), "")
    value = as_chat(row.get(field))
    if value is None or field == "chosen" and isinstance(value, str):
        raise Problem(f"{where}: no prompt (a field `prompt` with text, or a list of messages with role and "
                      f"content); the row has {', '.join(row)}: --prompt_field names another"[:400])
    if isinstance(value, list):
        while value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant" \
                and (field != "prompt" or not value[-1].get("content")):
            value = value[:-1]
    if field == "instruction" and row.get("input"):  # Alpaca
        value = f"{value}\n\n{row['input']}"
    if field in ("instruction", "question") and row.get("system"):  # Orca
        value = [{"role": "system", "content": row["system"]}, {"role": "user", "content": value}]
    return value, field


def as_chat(value):
    """ShareGPT's turns (from, value) and HH's transcripts as messages; anything else as it is."""
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        return [{"role": ROLES[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2])]
    if isinstance(value, list) and all(isinstance(turn, dict) and isinstance(turn.get("from"), str)
                                       and "value" in turn for turn in value):
        return [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in value]
    return value


def read_json(path):
    """The object that a JSON file holds."""
    value = from_json(Path(path).read_text(encoding="utf-8", errors="replace"), path)
    if not isinstance(value, dict):
        raise Problem(f"{path}: a JSON object is needed, this is {type(value).__name__}")
    return value


def from_json(text, path, before=0):
    """The value of a JSON text: of the file `path`, after `before` lines."""
    try:
        value = json.loads(text)
        if "\\u" in text or text.count("[") + text.count("{") > 100:
            _check_value(value)
        return value
    except (ValueError, RecursionError) as error:
        why = {RecursionError: "nested too deeply", UnicodeEncodeError: "half a surrogate pair in a text",
               ValueError: "a number of too many digits"}.get(type(error)) or f"not JSON ({error.msg})"
        raise Problem(f"{path}:{before + getattr(error, 'lineno', 1)}: {why}") from None


def _check_value(value, depth=0):
    """Fails where JSON could be read, but not be written again as UTF-8."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, (list, dict)):
        if depth > 100:
            raise RecursionError
        for inner in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            _check_value(inner, depth + 1)


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
    """An exception of a library as one line without control characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    if "above report" in text:  # transformers logs it where nobody looks
        return "its weights have other shapes than config.json says"
    return " ".join(text.split())[:300] or type(error).__name__


def write_jsonl(path, rows):
    """Write under a temporary name and rename: a file that exists is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


def read_jsonl(path):
    """The rows of a file of our own, which may be empty."""
    return [row for _, row in _read_json(Path(path))]


class Lines(Sequence):
    """The rows of a JSONL file of our own as a sequence: read when they are asked for, and not kept."""
    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.ends = array("q", accumulate(map(len, file), initial=0))
            self.bytes = mmap(file.fileno(), 0, access=ACCESS_READ) if self.ends[-1] else b""

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        text = self.bytes[self.ends[index]:self.ends[index + 1]].decode(errors="replace")
        return from_json(text.rstrip("\n"), self.path, index)


def read_selection(path):
    """selection.json of an E-step. The names in it become paths, so they are checked."""
    choice = read_json(path)
    rates, chosen = choice.get("win_rates"), choice.get("chosen", "")
    if not isinstance(rates, dict) or not all(map(is_number, rates.values())) or not all(
            re.fullmatch(r"step-\d+", str(name)) for name in (*rates, *[chosen] * (chosen is not None))):
        raise Problem(f"{path}: not as mt.py writes it (win_rates and chosen name checkpoints step-N); "
                      "delete it to choose again")
    return choice


# ---------------------------------------------------------------- fields and flags
def is_number(value):
    """NaN, infinities, true and what would overflow in a sum of squares are none."""
    return type(value) in (int, float) and abs(value) <= 1e100


LONGEST = 10**6  # characters of a prompt or an answer: more than any context that is trained here
TEXT = (f"text of at most {LONGEST:,} characters",
        lambda value: isinstance(value, str) and len(value) <= LONGEST)
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


def check_flag(name, value):
    """Numbers are finite, counts can be waited for; where a result goes, nothing is in the way."""
    if type(value) in (int, float):
        most = {"seed": 2**63 - 1, "top_p": 1, "prior": 100}.get(name, 10**6 if type(value) is int else 1e99)
        zero = name in ("seed tau temperature select_prompts resume_every log_every prior labels "
                        "spot_check").split()
        if not (0 < value <= most or zero and value == 0) or name == "temperature" and 0 < value < 1e-3:
            raise Problem(f"--{name} {value:.9g} makes no sense ({'from 0' if zero else 'above 0'}, to {most}"
                          f"{'; 0 is greedy, and else 0.001 the least' * (name == 'temperature')})")
    elif isinstance(value, str) and not value.isprintable():
        raise Problem(f"--{name} {value!r} holds characters that can't be printed")
    elif name == "report_to" and value:
        if value not in ("wandb", "tensorboard"):
            raise Problem(f"--report_to {value}: wandb or tensorboard")
        if not find_spec(value):
            raise Problem(f"--report_to {value}: it is not installed (pip install {value})")
    elif name in ("out", "json") and value:
        path, file = Path(value), name == "json" or value.endswith((".jsonl", ".json", ".html"))
        for place in path.parents if file else (path, *path.parents):
            if place.is_file():
                raise Problem(f"--{name} {value}: {place} is a file, not a folder")
        if file and path.is_dir():
            raise Problem(f"--{name} {value} is a folder, not a file")

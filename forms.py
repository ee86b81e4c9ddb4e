"""The prompt of a row, as people write rows: our own `prompt`, chats under other names, and transcripts."""
import re

from rows import Problem

NAMES = ("prompt", "messages", "conversations", "instruction", "question", "chosen")
ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}


def prompt_of(where, row, field=""):
    """(prompt, the field that it was found in). Of a chat under another name than `prompt` the assistant's
    last turns are left out: they are an answer."""
    field = field or next((name for name in NAMES if row.get(name) is not None), "")
    value = as_chat(row.get(field))
    if value is None or field == "chosen" and isinstance(value, str):
        raise Problem(f"{where}: no prompt (a field `prompt` with text, or a list of messages with role and "
                      f"content); the row has {', '.join(row)}: --prompt_field names another"[:400])
    if field != "prompt" and isinstance(value, list):
        while value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
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

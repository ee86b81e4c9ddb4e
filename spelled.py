"""Special tokens that a message spells ("<s>" in a user's text) are text like any other: nothing that is said
ends a turn or begins one.

A chat in which none is spelled never comes here. For the others the special tokens that the template writes
get names that nobody can guess, and a copy of the tokenizer knows special tokens by these names alone.
"""
import functools
import json
import os
import re

from tokenizers import Tokenizer

from rows import Problem, first_line

SECRET = os.urandom(8).hex()


@functools.lru_cache(4)  # each phase loads its own
def special_texts(tokenizer):
    """A pattern that finds the texts of a tokenizer's special tokens."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


@functools.lru_cache(4)  # each phase loads its own
class Careful:
    """hide(messages) goes into the template, reveal(text) takes what comes out, encode(text) gives its tokens
    and where they stand."""
    def __init__(self, tokenizer):
        self.special = special_texts(tokenizer)
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        for token in state["added_tokens"]:
            token["content"] = self._renamed(token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(text): number for text, number in model["vocab"].items()}
        else:  # Unigram
            model["vocab"] = [[self._renamed(text), score] for text, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._renamed(model["unk_token"])
        try:
            self.backend = Tokenizer.from_str(json.dumps(state))
        except Exception as error:
            raise Problem(f"{tokenizer.name_or_path}: a chat spells a special token, which this tokenizer "
                          f"can't tell from a real one ({first_line(error)})") from None

    def _name(self, text, kind="special"):
        return self.special.sub(lambda found: f"\ue000{SECRET}{kind}{found[0].encode().hex()}\ue001", text)

    def _renamed(self, text):
        return self._name(text) if self.special.fullmatch(text) else text

    def hide(self, messages):
        return [{key: self._name(value, "said") if isinstance(value, str) else value
                 for key, value in message.items()} for message in messages]

    def reveal(self, text):
        return re.sub(f"\ue000{SECRET}said(.*?)\ue001", lambda found: bytes.fromhex(found[1]).decode(),
                      self._name(text))

    def encode(self, text):
        encoded = self.backend.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

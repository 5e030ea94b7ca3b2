"""Answers held to a form: only tokens that can go on as valid JSON are drawn.

A JSON schema -> a grammar -> for each answer a matcher: after every token, which may follow.
"""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmo_base.run.errors import UserError

ANY_OBJECT = {"type": "object"}  # what response_format: json_object asks for
# A model that is held to JSON may otherwise write spaces to the end.
STYLE: Any = {"whitespace_pattern": " ?"}
MAX_SCHEMA_BYTES = 100_000


class Forms:
    """The grammars for one model's tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: set[int]) -> None:
        self.tokenizer = tokenizer  # the backend of a fast tokenizer
        self.vocab_size = vocab_size
        self.end_ids = sorted(end_ids)
        self._words: Any = None

    def matcher(self, schema: Any) -> Any:
        """A matcher before the first token. Errors: UserError for a schema that cannot be kept."""
        try:
            from llguidance import LLMatcher, LLTokenizer  # optional
        except ImportError:
            raise UserError(
                "response_format needs the package llguidance on the server: "
                "pip install 'open-instruct[json]'."
            ) from None
        if not self.end_ids:
            raise UserError("response_format needs a model that can end its answers.")
        content = json.dumps(schema)
        if len(content) > MAX_SCHEMA_BYTES:
            raise UserError(f"response_format holds a schema of over {MAX_SCHEMA_BYTES} bytes.")
        if self._words is None:
            self._words = LLTokenizer(
                self.tokenizer.to_str(), n_vocab=self.vocab_size, eos_token=self.end_ids
            )
        try:
            grammar = LLMatcher.grammar_from_json_schema(content, overrides=STYLE)
        except ValueError as error:
            raise UserError(f"response_format: {error}") from None
        is_wrong, notes = LLMatcher.validate_grammar_with_warnings(grammar, self._words)
        if is_wrong or notes:
            raise UserError(f"response_format: this schema cannot be kept to: {'; '.join(notes)}.")
        matcher = LLMatcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"response_format: {matcher.get_error()}")
        return matcher


def allow_only(scores_V: Tensor, matcher: Any) -> bool:
    """In place: tokens that the form does not allow next can no longer be drawn.

    False if the form has become too complex to say.
    """
    if matcher.is_error():
        return False
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    allowed = np.unpackbits(bits, count=len(scores_V), bitorder="little").astype(bool)
    scores_V.masked_fill_(torch.from_numpy(~allowed).to(scores_V.device), -torch.inf)
    return bool(allowed.any()) and not matcher.is_error()


def has_ended(matcher: Any, id_: int) -> bool:
    """Take a token that was drawn; whether the form is complete and nothing may follow."""
    return bool(matcher.consume_token(id_)) and bool(matcher.is_stopped())

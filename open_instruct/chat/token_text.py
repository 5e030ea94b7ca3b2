"""Tokens and their text: as it becomes certain in a stream, and of each token by itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Token:
    """A token of an answer; log-probabilities are the model's own, in nats."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()  # the likeliest, whether taken or not


class TextStream:
    """Text as soon as it is whole and cannot be the beginning of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer  # the backend of a fast tokenizer
        self.stop = stop
        self.ids: list[int] = []
        self.read = 0  # ids before this one are text already
        self.context = 0  # where decoding starts: a token's text may depend on the one before it
        self.before = ""  # the text of the ids from there to ``read``
        self.held = ""
        self.held_tokens: list[tuple[int, Token]] = []  # with where each begins in ``held``

    def push(self, token: Token) -> tuple[str, tuple[Token, ...], bool]:
        """One more token: text and tokens that are now certain, and whether a stop string came."""
        self.ids.append(token.id)
        self.held_tokens.append((len(self.held), token))
        after = self._decode(self.ids[self.context :])
        if len(after) > len(self.before) and not after.endswith("�"):
            self.held += after[len(self.before) :]
            self._is_read()
        return self._release()

    def _is_read(self) -> None:
        self.context, self.read = self.read, len(self.ids)
        self.before = self._decode(self.ids[self.context :])

    def finish(self) -> tuple[str, tuple[Token, ...]]:
        """What was held back, and bytes that never became a whole character."""
        self.held += self._decode(self.ids[self.context :])[len(self.before) :]
        self._is_read()
        text, tokens, is_stopped = self._release()
        if is_stopped:
            return text, tokens
        return text + self.held, (*tokens, *(token for _, token in self.held_tokens))

    def _release(self) -> tuple[str, tuple[Token, ...], bool]:
        if not self.stop:
            tokens = tuple(token for _, token in self.held_tokens)
            self.held_tokens = []
            return self._cut(len(self.held)), tokens, False
        found = [place for place in (self.held.find(stop) for stop in self.stop) if place >= 0]
        if found:
            return self._cut(min(found)), self._tokens_before(min(found), strictly=True), True
        kept = max(
            (
                length
                for stop in self.stop
                for length in range(1, min(len(stop), len(self.held) + 1))
                if self.held.endswith(stop[:length])
            ),
            default=0,
        )
        end = len(self.held) - kept
        tokens = self._tokens_before(end, strictly=kept > 0)
        text = self._cut(end)
        self.held_tokens = [(max(0, start - end), token) for start, token in self.held_tokens]
        return text, tokens, False

    def _cut(self, end: int) -> str:
        text, self.held = self.held[:end], self.held[end:]
        return text

    def _tokens_before(self, end: int, strictly: bool) -> tuple[Token, ...]:
        """Tokens that begin before a place; at it too, unless what stands there is held back."""
        is_out = [start < end or (start == end and not strictly) for start, _ in self.held_tokens]
        out = [token for (_, token), is_ in zip(self.held_tokens, is_out, strict=True) if is_]
        self.held_tokens = [
            item for item, is_ in zip(self.held_tokens, is_out, strict=True) if not is_
        ]
        return tuple(out)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


_BYTES = {  # the characters by which byte-level tokenizers write bytes that are no plain text
    chr(code): byte
    for byte, code in [
        *((byte, byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))),
        *((byte, 256 + number) for number, byte in enumerate((*range(33), *range(127, 161), 173))),
    ]
}


class TokenNames:
    """What a token stands for by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        decoder = json.loads(tokenizer.to_str())["decoder"] or {}
        kinds = [decoder, *decoder.get("decoders", ())]
        self.is_byte_level = any(kind.get("type") == "ByteLevel" for kind in kinds)
        added = tokenizer.get_added_tokens_decoder().items()
        self.special = {id_: token.content for id_, token in added if token.special}

    def bytes_of(self, id_: int) -> bytes:
        """Its bytes; they may be a part of a character."""
        name = self.tokenizer.id_to_token(id_) or ""
        if self.is_byte_level and id_ not in self.special and all(c in _BYTES for c in name):
            return bytes(_BYTES[character] for character in name)
        text = name if id_ in self.special else self.tokenizer.decode([id_])
        return text.encode()

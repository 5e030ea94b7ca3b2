"""Text -> token ids, where a control token counts only at the places its author marked.

A control string is a string that steers the model: a special token such as ``<|endoftext|>``, or a
marker of the chat template such as ``<|assistant|>`` that the tokenizer may not even know. The
template writes them to open and close turns. When a message spells the same characters they are
ordinary text, and must get other ids than the template's.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from olmo_base.run.errors import UserError

Span = tuple[int, int]  # characters [start, end) of a text


class CannotEncode(UserError):
    """A dialogue that this template and tokenizer cannot write down exactly."""

    def __init__(self, problem: str, reason: str) -> None:
        super().__init__(problem)
        self.reason = reason  # a few words, for the counts of dropped examples


@dataclass(frozen=True)
class Rendered:
    """A dialogue as text, with what is known about its characters."""

    text: str
    learnt: list[Span]  # what the model learns to write
    controls: list[Span]  # the control strings that the template wrote, in order


class Encoded(NamedTuple):
    """One sequence: token ids, and for each whether the model learns to write it."""

    ids: list[int]
    is_learnt: list[bool]


# ---------------------------------------------------------------- which strings are control strings

# Markers as templates write them when the tokenizer does not know them: <|user|>, </s>, [INST]
_BRACKETED = re.compile(r"<[^\s<>]+>|\[/?[A-Z_]+\]")


def find_control_tokens(
    tokenizer: PreTrainedTokenizerFast, frames: Iterable[str]
) -> dict[str, int]:
    """Control tokens and their ids: every special token, and added tokens the template writes.

    Other added tokens are vocabulary (runs of spaces, ``|||EMAIL_ADDRESS|||``) that ordinary text
    may use. ``frames`` is the text that the template writes around messages.
    """
    written = "\n".join(frames)
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and (token.special or token.content in written)
    }


def find_text_markers(control_tokens: Iterable[str], frames: Iterable[str]) -> list[str]:
    """Strings by which the template marks turns and which the tokenizer has no token for."""
    pattern = _any_of(control_tokens)
    markers = set()
    for frame in frames:
        pieces = pattern.split(frame)
        bracketed = [found for piece in pieces for found in _BRACKETED.findall(piece)]
        markers.update(bracketed)
        if len(pieces) == 1 and not bracketed and frame.strip():
            markers.add(frame.strip())  # a header in plain words, such as "ASSISTANT:"
    return sorted(markers)


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first, as a tokenizer does."""
    longest_first = sorted(strings, key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


# ---------------------------------------------------------------- telling them apart


class ControlTokens:
    """A tokenizer with the control strings of one template.

    ``samples`` are a few dialogues as the template writes them, each a sequence of its own text
    (before, between and after the messages).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sequence[str]]
    ) -> None:
        frames = [frame for sample in samples for frame in sample]
        self.ids = find_control_tokens(tokenizer, frames)
        self.text_markers = find_text_markers(self.ids, frames)
        self._pattern = _any_of([*self.ids, *self.text_markers])
        self._id_set = frozenset(self.ids.values())
        # No post-processor: ids never need one here, and the byte-level one trims spaces from the
        # offsets, so that a learnt space would seem to belong to nobody.
        self._content = json.loads(tokenizer.backend_tokenizer.to_str())
        self._content.update(post_processor=None, truncation=None, padding=None)
        self._tokenizer = Tokenizer.from_str(json.dumps(self._content))
        # A token matched after normalisation can be spelt with other characters than its own.
        self._is_spelt_one_way = self._content["normalizer"] is None or not any(
            token["normalized"] and token["content"] in self.ids
            for token in self._content["added_tokens"]
        )
        self._text_marker_pattern = _any_of(self.text_markers)
        self._guard: _Guard | None = None
        sample_texts = ["Hi.".join(sample) for sample in samples]
        self._breaks = {
            marker: self._find_break(marker, sample_texts) for marker in self.text_markers
        }

    def spans(self, text: str) -> list[Span]:
        """Where control strings stand in a text, whoever wrote them."""
        return [match.span() for match in self._pattern.finditer(text)]

    def encode(self, texts: Sequence[Rendered]) -> list[Encoded]:
        """Ids and mask of each text.

        Where the only control strings are the template's, the ids are those of the plain
        tokenizer. Errors: CannotEncode if a message spells a control string in a way that this
        tokenizer cannot tell from the template's.
        """
        for rendered in texts:
            self._refuse_disguised_markers(rendered.text)
        encodings = self._tokenizer.encode_batch(
            [rendered.text for rendered in texts], add_special_tokens=False
        )
        return [
            _with_mask(encoding.ids, encoding.offsets, rendered.learnt)
            if self._is_plain(rendered, encoding)
            else self._encode_guarded(rendered)
            for rendered, encoding in zip(texts, encodings, strict=True)
        ]

    def _is_plain(self, rendered: Rendered, encoding: Encoding) -> bool:
        if self.spans(rendered.text) != rendered.controls:
            return False
        if self._is_spelt_one_way:
            return True
        num_tokens = sum(number in self._id_set for number in encoding.ids)
        return num_tokens == len(self._template_tokens(rendered))

    def _refuse_disguised_markers(self, text: str) -> None:
        """Refuse a text whose normal form spells a marker that the text itself does not."""
        normalizer = self._tokenizer.normalizer
        if normalizer is None or not self.text_markers or text.isascii():
            return
        pattern = self._text_marker_pattern
        if len(pattern.findall(normalizer.normalize_str(text))) != len(pattern.findall(text)):
            raise CannotEncode(
                "a message spells a marker of the chat template in characters that the tokenizer "
                "replaces by the marker's own. Use plain characters, or a tokenizer that has the "
                "marker as a special token.",
                "spells a marker of the chat template",
            )

    def _template_tokens(self, rendered: Rendered) -> list[tuple[Span, str]]:
        """The control tokens that the template wrote; its markers in plain text left out."""
        found = [(span, rendered.text[slice(*span)]) for span in rendered.controls]
        return [(span, string) for span, string in found if string in self.ids]

    def _encode_guarded(self, rendered: Rendered) -> Encoded:
        """Ids of a text whose messages spell control strings.

        The template's control tokens are replaced by stand-ins that only a copy of the tokenizer
        knows, and that copy does not know the control tokens themselves. Markers that are plain
        text for the tokenizer are cut by one more stand-in, at a place where the template's own
        are not cut.
        """
        guard = self._guard_for(rendered.text)
        owned = self._template_tokens(rendered)
        edits = [(span, guard.stand_ins[string]) for span, string in owned]
        forged = [
            (start, marker)
            for marker in self.text_markers
            for start in _occurrences(marker, rendered.text)
            if not any(a <= start and start + len(marker) <= b for a, b in rendered.controls)
        ]
        for start, marker in forged:
            cut = self._breaks[marker]
            if cut is None:
                raise CannotEncode(
                    f"a message spells {marker!r}, which opens or closes a turn in this chat "
                    "template, and the tokenizer cannot write it in a second way. Use a tokenizer "
                    f"that has {marker!r} as a special token.",
                    "spells a marker of the chat template",
                )
            place = start + cut
            if not any(a < place < b for a, b in rendered.controls):
                edits.append(((place, place), guard.cut))
        text, moved = _edit(rendered.text, sorted(set(edits)))
        encoding = guard.tokenizer.encode(text, add_special_tokens=False)
        learnt = [(moved(start), moved(end)) for start, end in rendered.learnt]
        masked = _with_mask(encoding.ids, encoding.offsets, learnt)
        kept = [
            (guard.real_ids.get(number, number), is_learnt)
            for number, is_learnt in zip(*masked, strict=True)
            if number != guard.cut_id
        ]
        result = Encoded([item[0] for item in kept], [item[1] for item in kept])
        written = [number for number in result.ids if number in self._id_set]
        if written != [self.ids[string] for _, string in owned]:
            raise CannotEncode(
                "a message spells a control token, and the tokenizer makes that token even of "
                "ordinary text.",
                "spells a control token",
            )
        return result

    def _find_break(self, marker: str, sample_texts: Sequence[str]) -> int | None:
        """A place inside the marker where no token begins when the template writes it."""
        free = set(range(1, len(marker)))
        for text in sample_texts:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            token_starts = {start for start, _ in encoding.offsets}
            for start in _occurrences(marker, text):
                free -= {token_start - start for token_start in token_starts}
        return min(free, default=None)

    def _guard_for(self, text: str) -> "_Guard":
        if self._guard is None or self._guard.mark in text:
            # Private use characters: the stand-ins hold one that the text does not.
            mark = next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in text)
            self._guard = _build_guard(self._content, self.ids, mark)
        return self._guard


@dataclass(frozen=True)
class _Guard:
    """A tokenizer that knows stand-ins for control tokens, and not the control tokens."""

    mark: str
    tokenizer: Tokenizer
    stand_ins: dict[str, str]  # control token -> what stands for it in a text
    real_ids: dict[int, int]  # ids of this tokenizer -> ids of the real one, where they differ
    cut: str  # stands between two pieces of text that must not make one token
    cut_id: int


def _build_guard(content: dict, control_ids: dict[str, int], mark: str) -> _Guard:
    added = content["added_tokens"]
    kept = [token for token in added if token["content"] not in control_ids]
    tokenizer = Tokenizer.from_str(json.dumps({**content, "added_tokens": kept}))
    stand_ins = {
        string: f"{mark}{number}{mark}" for number, string in enumerate(sorted(control_ids))
    }
    sides = {token["content"]: (token["lstrip"], token["rstrip"]) for token in added}
    cut = f"{mark}cut{mark}"
    tokenizer.add_special_tokens(
        [
            AddedToken(stand_in, lstrip=sides[string][0], rstrip=sides[string][1], normalized=False)
            for string, stand_in in stand_ins.items()
        ]
        + [AddedToken(cut, normalized=False)]
    )
    vocabulary = tokenizer.get_vocab()
    real_ids = {vocabulary[stand_ins[string]]: control_ids[string] for string in stand_ins}
    # Added tokens that stay may have moved up into the places of those that went.
    real_ids.update({vocabulary[token["content"]]: token["id"] for token in kept})
    return _Guard(mark, tokenizer, stand_ins, real_ids, cut, vocabulary[cut])


# ---------------------------------------------------------------- characters and tokens


def _with_mask(ids: list[int], offsets: list[Span], learnt: Iterable[Span]) -> Encoded:
    """A token is learnt if any of its characters is."""
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    is_learnt = [False] * len(ids)
    for start, end in learnt:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        is_learnt[first:last] = [True] * (last - first)
    return Encoded(ids, is_learnt)


def _occurrences(string: str, text: str) -> list[int]:
    """Where a string starts in a text; occurrences may overlap."""
    return [match.start() for match in re.finditer(f"(?={re.escape(string)})", text)]


def _edit(text: str, edits: Sequence[tuple[Span, str]]) -> tuple[str, Callable[[int], int]]:
    """The text with spans replaced, and where each of its places has moved to.

    ``edits`` are in order and do not overlap; the places asked for lie outside them.
    """
    pieces, position, shift = [], 0, 0
    edit_ends, shifts = [0], [0]
    for (start, end), replacement in edits:
        pieces += [text[position:start], replacement]
        position = end
        shift += len(replacement) - (end - start)
        edit_ends.append(end)
        shifts.append(shift)
    pieces.append(text[position:])
    return "".join(pieces), lambda place: place + shifts[bisect_right(edit_ends, place) - 1]

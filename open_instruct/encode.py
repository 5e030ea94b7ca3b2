"""Messages -> token ids and which of them are learnt. The only reader of chat_templates/.

    messages --template--> text, and who wrote each character --tokenizer--> ids, is_learnt

Text comes from transformers' own template engine and is tokenised in one call, so the ids are
those of ``tokenizer.apply_chat_template``. One thing differs on purpose: a control token opens or
closes a turn only where the template wrote it (control_tokens.py).
"""

import contextlib
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from olmo_base.run.artefact import ExampleCounts, atomic_write, resolve_model
from olmo_base.run.errors import DataError, UserError
from open_instruct import shipped_folder
from open_instruct.chat_template import (
    THINK,
    ChatTemplate,
    Layout,
    Learnt,
    Shape,
    frames_of,
    locate,
    marked_around,
    shape_of,
    whole_text,
)
from open_instruct.control_tokens import CannotEncode, ControlTokens, Encoded, Rendered, Span
from open_instruct.examples import DataConfig, Dialogue, Pair, Rated
from open_instruct.turns import Message, Tools

BATCH_SIZE = 512  # examples tokenised in one call
MOST_LAYOUTS = 10_000  # kept at a time; dialogues that call tools have one each


class EncodedPair(NamedTuple):
    """Two answers to one prompt. The first ``shared_prompt_length`` ids are the same in both."""

    chosen: Encoded
    rejected: Encoded
    shared_prompt_length: int
    margin: float = 0.0


class EncodedRated(NamedTuple):
    """A rated answer behind its prompt; only the answer is learnt."""

    sequence: Encoded
    prompt_length: int  # ids before the answer
    is_desirable: bool


# ---------------------------------------------------------------- messages -> ids


class ChatEncoder:
    """Turns messages into ids, with one tokenizer and one chat template.

    Errors: CannotEncode (a UserError), with the reason, if the template does not write the turns
    of a dialogue one after the other. A template that writes them and cannot be masked exactly
    still serves for prompts.
    """

    end_of_turn_ids: set[int]  # where generation must stop

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str,
        template_name: str = "the chat template",
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._template = ChatTemplate(template, tokenizer.special_tokens_map, template_name)
        self._layouts: dict[Any, Layout] = {}
        self._spells_control: Callable[[str], object] = lambda text: False  # not known yet

        samples = self._samples()
        frames = [self._frames(messages) for messages in samples]
        self._control_tokens = ControlTokens(tokenizer, frames)
        self._spells_control = self._control_tokens.spans
        self.control_ids = frozenset(self._control_tokens.ids.values())
        self.end_of_turn_ids = set()
        self._ends_of_turn: set[str] = set()
        if tokenizer.eos_token_id is not None:
            self.end_of_turn_ids.add(tokenizer.eos_token_id)
        self._first_sample = samples[0]
        for messages in samples:  # finds the ends of turns; whoever learns from such a dialogue
            with contextlib.suppress(CannotEncode):  # is told what is wrong with the template
                self._layout(self._shape(messages), is_learnt=True)
        # A sequence cut from the left keeps the token that opens every document.
        openers = {tokenizer.bos_token, tokenizer.eos_token} - {None}
        self._opener = next((str(item) for item in openers if frames[0][0].startswith(item)), "")
        self.opens_with_bos = bool(self._opener)

    def _shape(self, messages: Sequence[Message], tools: Tools | None = None) -> Shape:
        return shape_of(messages, tools, self._spells_control)

    def _frames(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """The template's own text around messages; what opens reasoning may stand in any text."""
        frames, _ = frames_of(self._template, self._shape(messages))
        return tuple(frame.replace(THINK, "") for frame in frames)

    def _samples(self) -> list[list[Message]]:
        """Short dialogues that the template can write; one of a single turn must be among them.

        A template of reasoning models may ask that answers begin with their reasoning.
        """
        turn = ("user", "assistant")
        usable: list[list[Message]] = []
        refusal: CannotEncode | None = None
        for opening in ("", THINK):
            for roles in (turn, ("system", *turn), turn + turn, ("system", *turn, *turn)):
                messages: list[Message] = [
                    {"role": role, "content": (opening if role == "assistant" else "") + "x"}
                    for role in roles
                ]
                try:
                    self._frames(messages)
                except CannotEncode as error:
                    refusal = refusal or error
                    if roles == turn:
                        break
                    continue  # no system turns, or one turn only; dialogues of those say so
                usable.append(messages)
            if usable:
                return usable
        assert refusal is not None
        raise refusal

    # ------------------------------------------------ what callers ask for

    def check_can_be_learnt(self) -> None:
        """Refuse a template whose answers cannot be told apart token by token, saying why."""
        self._layout(self._shape(self._first_sample), is_learnt=True)

    def encode_dialogue(
        self, messages: Sequence[Message], *, tools: Tools | None = None
    ) -> Encoded:
        """A whole dialogue. Every assistant turn is learnt, with the token that ends it.

        Except those whose ``train`` is false.
        """
        return self.encode_many([(messages, tools)])[0]

    def encode_many(
        self,
        dialogues: Sequence[tuple[Sequence[Message], Tools | None] | str],
        *,
        learn_last_only: bool = False,
    ) -> list[Encoded]:
        """``encode_dialogue`` for many, in one call of the tokenizer.

        A text among them is a document without turns, learnt from its first token to its end.
        """
        return self._control_tokens.encode(
            [
                self._document(item)
                if isinstance(item, str)
                else self._rendered(*item, learnt=learnt_turns(item[0], 0, learn_last_only))
                for item in dialogues
            ]
        )

    def _document(self, text: str) -> Rendered:
        """A text between the tokens that open and end every document, all of it learnt."""
        opener, end = self._opener, self.tokenizer.eos_token
        if end is None:
            raise CannotEncode(
                "this tokenizer has no eos token to end a text with. Use one that has.",
                "no end of text",
            )
        whole = opener + text + end
        controls = [(0, len(opener)), (len(whole) - len(end), len(whole))]
        return Rendered(whole, [(len(opener), len(whole))], controls if opener else controls[1:])

    def encode_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
    ) -> list[int]:
        """The ids that a model goes on from when it answers."""
        rendered = self._rendered(messages, tools, add_generation_prompt=add_generation_prompt)
        return self._control_tokens.encode([rendered])[0].ids

    def encode_pair(
        self, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
    ) -> EncodedPair:
        """Two answers to one prompt. Only the answers are learnt, not earlier assistant turns.

        ``shared_prompt_length`` counts the ids of ``encode_prompt(prompt)``, without those at its
        end (rarely any) that the tokenizer merged with the first characters of an answer.
        """
        return self.encode_many_pairs([(prompt, chosen, rejected, None)])[0]

    def encode_many_pairs(
        self,
        pairs: Sequence[
            tuple[Sequence[Message], Sequence[Message], Sequence[Message], Tools | None]
        ],
        *,
        learn_last_only: bool = False,
    ) -> list[EncodedPair]:
        """``encode_pair`` for many, in one call of the tokenizer."""
        texts = []
        for prompt, chosen, rejected, tools in pairs:
            rendered_prompt = self._rendered(prompt, tools, add_generation_prompt=True)
            texts.append(rendered_prompt)
            for answer in (chosen, rejected):
                messages = [*prompt, *answer]
                learnt = learnt_turns(messages, len(prompt), learn_last_only)
                whole = self._rendered(messages, tools, learnt=learnt)
                if not whole.text.startswith(rendered_prompt.text):
                    raise CannotEncode(
                        f"{self._template.name} writes the prompt differently once an answer "
                        "follows, so a preference would compare something never asked.",
                        "rewritten by the chat template",
                    )
                texts.append(whole)
        encoded = self._control_tokens.encode(texts)
        triples = zip(encoded[0::3], encoded[1::3], encoded[2::3], strict=True)
        return [
            EncodedPair(chosen, rejected, _common_length(prompt.ids, chosen.ids, rejected.ids))
            for prompt, chosen, rejected in triples
        ]

    # ------------------------------------------------ text -> who wrote what

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        add_generation_prompt: bool = False,
        learnt: frozenset[int] | None = None,
    ) -> Rendered:
        """The text of a dialogue of which the messages with these numbers are learnt."""
        shape = self._shape(messages, tools)
        settings = (add_generation_prompt, learnt is not None)
        is_known = (shape.key, *settings) in self._layouts
        text = self._template.render(messages, tools, add_generation_prompt)
        rendered = locate(text, shape, self._layout(shape, *settings), learnt or ())
        if rendered is None and is_known:  # a template that writes the date, and a new day
            del self._layouts[(shape.key, *settings)]
            rendered = locate(text, shape, self._layout(shape, *settings), learnt or ())
        if rendered is None:
            if learnt is None and not any(map(self._spells_control, shape.leaves)):
                return Rendered(text, [], self._control_tokens.spans(text))
            raise CannotEncode(
                f"{self._template.name} changes the text of a message (or what stands around it, "
                "depending on the text), so it cannot be said which tokens are whose.",
                "rewritten by the chat template",
            )
        return rendered

    def _layout(
        self, shape: Shape, add_generation_prompt: bool = False, is_learnt: bool = False
    ) -> Layout:
        key = (shape.key, add_generation_prompt, is_learnt)
        if key not in self._layouts:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            frames, slots = frames_of(self._template, shape, add_generation_prompt)
            controls = tuple(self._control_tokens.spans(frame) for frame in frames)
            learnt: list[Learnt] = []
            if is_learnt:
                marked = (
                    marked_around(self._template, shape) if self._template.has_markers else None
                )
                learnt = [
                    self._learnt(shape, number, frames, slots, controls, marked)
                    for number, turn in enumerate(shape.messages)
                    if turn["role"] == "assistant"
                ]
            self._layouts[key] = Layout(frames, slots, controls, tuple(learnt))
        return self._layouts[key]

    def _learnt(
        self,
        shape: Shape,
        number: int,
        frames: tuple[str, ...],
        slots: tuple[int, ...],
        controls: tuple[list[Span], ...],
        marked: dict[int, tuple[int, int]] | None,
    ) -> Learnt:
        """How much of the template's text around assistant turn ``number`` is learnt with it.

        A template with ``{% generation %}`` markers says so itself. One without is asked for the
        prompt of this turn: what follows the prompt is learnt, up to the end-of-turn token.
        """
        name = self._template.name
        first, last = shape.slots_of(number, slots)
        after, spans = frames[last + 1], controls[last + 1]
        has_calls = "tool_calls" in shape.messages[number]
        if has_calls:  # the template closes its calls before it ends the turn
            spans = [span for span in spans if after[slice(*span)] in self._ends_of_turn]
        end_span = next(iter(spans), (0, 0))
        end_of_turn = after[slice(*end_span)]
        if not end_of_turn or (after[: end_span[0]].strip() and not has_calls):
            raise CannotEncode(
                f"{name} writes no token that ends an assistant's turn"
                f"{' at the end of a dialogue' if number == len(shape.messages) - 1 else ''}: the "
                "model would never learn to stop. Choose a template that does, such as tulu.",
                "no end of turn",
            )
        if end_of_turn not in self._control_tokens.ids:
            raise CannotEncode(
                f"{name} ends an assistant's turn with {end_of_turn!r}, which is not a token of "
                "this tokenizer, so generation could not stop there. Choose a template that ends "
                "with the tokenizer's eos token, such as tulu, or train the tokenizer with it.",
                "no end of turn",
            )
        self._ends_of_turn.add(end_of_turn)
        self.end_of_turn_ids.add(self._control_tokens.ids[end_of_turn])
        if marked is None:
            before = self._unprompted_length(shape, number, frames, slots)
            return Learnt(number, first, last, before, end_span[1])
        before, behind = marked[number]
        if behind < end_span[1]:
            raise CannotEncode(
                f"{name} has its {{% endgeneration %}} before {end_of_turn!r}: the model would "
                "never learn to end its turn. Move the marker behind it.",
                "no end of turn",
            )
        if number == 1 and shape.messages[0]["role"] == "user":
            self._unprompted_length(shape, number, frames, slots, before)
        return Learnt(number, first, last, before, behind)

    def _unprompted_length(
        self,
        shape: Shape,
        number: int,
        frames: tuple[str, ...],
        slots: tuple[int, ...],
        marked_before: int = 0,
    ) -> int:
        """Characters between the generation prompt and message ``number``.

        Apart from ``marked_before`` of them, which the template itself marks as learnt, they may
        only be spaces, what opens an answer, or what opens the call of a tool.
        """
        messages = shape.messages[:number]
        prompt = self._template.render(messages, shape.tools, add_generation_prompt=True)
        first, _ = shape.slots_of(number, slots)
        before = whole_text(frames, slots, first)
        unlearnt = before[len(prompt) : len(before) - marked_before].strip()
        may_stand = ("", shape.openings[number])
        is_call = "tool_calls" in shape.messages[number] and not marked_before
        if not before.startswith(prompt) or (unlearnt not in may_stand and not is_call):
            raise CannotEncode(
                f"{self._template.name} writes a prompt (add_generation_prompt) that is not the "
                "start of what it writes once the answer is there, so the model would learn to "
                "answer something else than it is asked. Choose another template.",
                "rewritten by the chat template",
            )
        return len(before) - len(prompt)


def learnt_turns(messages: Sequence[Message], start: int, last_only: bool) -> frozenset[int]:
    """The numbers of the assistant turns that are learnt, from ``start`` on."""
    numbers = [
        number
        for number, turn in enumerate(messages)
        if number >= start and turn["role"] == "assistant" and turn.get("train", True)
    ]
    return frozenset(numbers[-1:] if last_only else numbers)


def _common_length(*sequences: Sequence[int]) -> int:
    """How many first items all sequences share."""
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length


# ---------------------------------------------------------------- many examples, of bounded length

Example = TypeVar("Example", Dialogue, Pair, Rated)
Result = TypeVar("Result")


def encode_dialogues(
    dialogues: Sequence[Dialogue], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[Encoded]:
    """Dialogues as sequences of at most ``max_length`` ids, in order.

    What is cut or left out is counted, with the reason. Errors: DataError at the first example
    that cannot be used, UserError if more than ``max_too_long_fraction`` are too long.
    """
    whole = encode_whole_dialogues(dialogues, encoder, config, counts)
    return fit_dialogues(whole, encoder, config, counts)


def encode_pairs(
    pairs: Sequence[Pair], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[EncodedPair]:
    """Pairs whose two sequences have at most ``max_length`` ids each, in order.

    Both sides of a pair keep the same prompt when it is cut. Counts and errors as in
    ``encode_dialogues``.
    """
    whole = encode_whole_pairs(pairs, encoder, config, counts)
    return fit_pairs(whole, encoder, config, counts)


def encode_whole_dialogues(
    dialogues: Sequence[Dialogue], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[tuple[Dialogue, Encoded]]:
    """The first half of ``encode_dialogues``: sequences of any length."""
    encoder.check_can_be_learnt()
    return _encode_each(
        dialogues,
        lambda batch: encoder.encode_many(
            [item.text or (item.messages, item.tools) for item in batch],
            learn_last_only=config.learn_turns == "last",
        ),
        config,
        counts,
    )


def encode_whole_pairs(
    pairs: Sequence[Pair], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[tuple[Pair, EncodedPair]]:
    """The first half of ``encode_pairs``: sequences of any length."""
    encoder.check_can_be_learnt()

    def encode_many(batch: Sequence[Pair]) -> list[EncodedPair]:
        encoded = encoder.encode_many_pairs(
            [(item.prompt, item.chosen, item.rejected, item.tools) for item in batch],
            learn_last_only=config.learn_turns == "last",
        )
        return [
            pair._replace(margin=item.margin) for item, pair in zip(batch, encoded, strict=True)
        ]

    return _encode_each(pairs, encode_many, config, counts)


def encode_rated(
    rated: Sequence[Rated], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[EncodedRated]:
    """Rated answers as sequences of at most ``max_length`` ids, in order.

    Counts and errors as in ``encode_dialogues``.
    """
    whole = encode_whole_rated(rated, encoder, config, counts)
    return fit_rated(whole, encoder, config, counts)


def encode_whole_rated(
    rated: Sequence[Rated], encoder: ChatEncoder, config: DataConfig, counts: ExampleCounts
) -> list[tuple[Rated, EncodedRated]]:
    """The first half of ``encode_rated``: sequences of any length."""
    encoder.check_can_be_learnt()

    def encode_many(batch: Sequence[Rated]) -> list[EncodedRated]:
        # A pair of the answer with itself: pairs know where the prompt ends.
        pairs = encoder.encode_many_pairs(
            [(item.prompt, item.answer, item.answer, item.tools) for item in batch],
            learn_last_only=config.learn_turns == "last",
        )
        return [
            EncodedRated(pair.chosen, pair.shared_prompt_length, item.is_desirable)
            for item, pair in zip(batch, pairs, strict=True)
        ]

    return _encode_each(rated, encode_many, config, counts)


def fit_rated(
    whole: Sequence[tuple[Rated, EncodedRated]],
    encoder: ChatEncoder,
    config: DataConfig,
    counts: ExampleCounts,
) -> list[EncodedRated]:
    """The second half of ``encode_rated``: what to do with those that are too long."""
    _check_lengths([(item, len(rated.sequence.ids)) for item, rated in whole], config)
    kept = []
    for _, rated in whole:
        if len(rated.sequence.ids) > config.max_length:
            if config.on_too_long == "drop":
                counts.drop("longer than max_length")
                continue
            pair = EncodedPair(rated.sequence, rated.sequence, rated.prompt_length)
            cut = _cut_pair(pair, config, encoder.opens_with_bos)
            if isinstance(cut, str):
                counts.drop(cut)
                continue
            rated = EncodedRated(cut.chosen, cut.shared_prompt_length, rated.is_desirable)
            counts.truncated += 1
        kept.append(rated)
    counts.used += len(kept)
    return kept


def fit_dialogues(
    whole: Sequence[tuple[Dialogue, Encoded]],
    encoder: ChatEncoder,
    config: DataConfig,
    counts: ExampleCounts,
) -> list[Encoded]:
    """The second half of ``encode_dialogues``: what to do with those that are too long."""
    _check_lengths([(item, len(sequence.ids)) for item, sequence in whole], config)
    kept = []
    for _, sequence in whole:
        if len(sequence.ids) > config.max_length:
            if config.on_too_long == "drop":
                counts.drop("longer than max_length")
                continue
            sequence = _cut(sequence, config, encoder.opens_with_bos)
            if not any(sequence.is_learnt):
                counts.drop("nothing left to learn after truncation")
                continue
            counts.truncated += 1
        kept.append(sequence)
    counts.used += len(kept)
    return kept


def fit_pairs(
    whole: Sequence[tuple[Pair, EncodedPair]],
    encoder: ChatEncoder,
    config: DataConfig,
    counts: ExampleCounts,
) -> list[EncodedPair]:
    """The second half of ``encode_pairs``: what to do with those that are too long."""
    _check_lengths([(item, pair_length(pair)) for item, pair in whole], config)
    kept = []
    for _, pair in whole:
        if pair_length(pair) > config.max_length:
            if config.on_too_long == "drop":
                counts.drop("longer than max_length")
                continue
            cut = _cut_pair(pair, config, encoder.opens_with_bos)
            if isinstance(cut, str):
                counts.drop(cut)
                continue
            if cut.chosen.ids == cut.rejected.ids:
                counts.drop("chosen and rejected the same after truncation")
                continue
            pair = cut._replace(margin=pair.margin)
            counts.truncated += 1
        kept.append(pair)
    counts.used += len(kept)
    return kept


def _encode_each(
    items: Sequence[Example],
    encode_many: Callable[[Sequence[Example]], list[Result]],
    config: DataConfig,
    counts: ExampleCounts,
) -> list[tuple[Example, Result]]:
    """Each example with its encoding, in batches; where a batch fails, one by one."""
    encoded: list[tuple[Example, Result]] = []
    for batch in _batches(items):
        try:
            encoded += zip(batch, encode_many(batch), strict=True)
            continue
        except CannotEncode:
            pass  # found and named below
        for item in batch:
            try:
                encoded.append((item, encode_many([item])[0]))
            except CannotEncode as error:
                if config.on_bad_row == "error":
                    raise DataError(item.source, item.line, str(error)) from None
                counts.drop(error.reason)
    return encoded


def _batches(items: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(items), BATCH_SIZE):
        yield items[start : start + BATCH_SIZE]


def pair_length(pair: EncodedPair) -> int:
    """Ids of the longer side."""
    return max(len(pair.chosen.ids), len(pair.rejected.ids))


def _check_lengths(
    lengths: Sequence[tuple[Dialogue | Pair | Rated, int]], config: DataConfig
) -> None:
    """Refuse examples that are too long, if the recipe refuses them or if there are too many."""
    too_long = [(item, length) for item, length in lengths if length > config.max_length]
    if not too_long:
        return
    longest = max(length for _, length in too_long)
    found = (
        f"{len(too_long):,} of {len(lengths):,} examples ({len(too_long) / len(lengths):.1%}) are "
        f"longer than max_length ({config.max_length:,} tokens); the longest has {longest:,}"
    )
    if config.on_too_long == "error":
        first, length = too_long[0]
        raise DataError(
            first.source,
            first.line,
            f"{length:,} tokens. {found}.",
            "Raise max_length, or choose on_too_long: drop, truncate_left or truncate_right.",
        )
    if len(too_long) > config.max_too_long_fraction * len(lengths):
        raise UserError(
            f"{found}; max_too_long_fraction allows {config.max_too_long_fraction:.1%}. Raise "
            f"max_length, or raise max_too_long_fraction to let on_too_long: {config.on_too_long} "
            "change that many."
        )


def _cut(sequence: Encoded, config: DataConfig, opens_with_bos: bool) -> Encoded:
    """The sequence with at most ``max_length`` ids; cut on the left, it keeps its bos."""
    if config.on_too_long == "truncate_right":
        return Encoded(sequence.ids[: config.max_length], sequence.is_learnt[: config.max_length])
    return _without(sequence, int(opens_with_bos), len(sequence.ids) - config.max_length)


def _without(sequence: Encoded, start: int, number: int) -> Encoded:
    """The sequence without ``number`` ids from ``start`` on."""
    ids, is_learnt = sequence
    return Encoded(
        ids[:start] + ids[start + number :], is_learnt[:start] + is_learnt[start + number :]
    )


def _cut_pair(pair: EncodedPair, config: DataConfig, opens_with_bos: bool) -> EncodedPair | str:
    """The pair with at most ``max_length`` ids a side, or why nothing useful is left of it."""
    if config.on_too_long == "truncate_right":
        chosen, rejected = (_cut(side, config, opens_with_bos) for side in pair[:2])
        shared = min(pair.shared_prompt_length, config.max_length)
    else:
        number = pair_length(pair) - config.max_length
        start = int(opens_with_bos)
        if number > pair.shared_prompt_length - start:
            return "answer longer than max_length"
        chosen, rejected = (_without(side, start, number) for side in pair[:2])
        shared = pair.shared_prompt_length - number
    if not any(chosen.is_learnt) or not any(rejected.is_learnt):
        return "nothing left to learn after truncation"
    return EncodedPair(chosen, rejected, shared)


# ---------------------------------------------------------------- from and to model folders


def load_chat_encoder(
    model_folder: str | Path,
    chat_template: str | None = None,
    new_tokens: Sequence[str] = (),
) -> ChatEncoder:
    """The encoder of a model, with special tokens of its own if there are ``new_tokens``.

    ``chat_template`` is a name in chat_templates/, the path of a Jinja file, or None for the
    template that the model carries. Errors: UserError if there is no tokenizer or no template.
    """
    folder = Path(model_folder)
    if not folder.is_dir():
        folder = resolve_model(str(model_folder))
    tokenizer = load_chat_tokenizer(folder)
    add_new_tokens(tokenizer, new_tokens)
    if chat_template is not None:
        path = find_template(chat_template)
        return ChatEncoder(tokenizer, _read_template(path), f"the chat template {path.stem}")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise UserError(
            f"{folder} has no chat template (chat_template.jinja): it was never tuned on "
            f"dialogues. Name one in the recipe, chat_template: {' | '.join(template_names())}, "
            "or run the sft stage on it first."
        )
    return ChatEncoder(tokenizer, own, f"the chat template of {folder}")


def load_chat_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a model folder. Errors: UserError if it holds none that can be used."""
    needed = "tokenizer.json and tokenizer_config.json"
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise UserError(
            f"{folder} holds no tokenizer ({needed}). Copy those files from the model it was "
            "made of, or give the output_dir of a run, which has them."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers lets JSON, key, value and Rust errors through
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"The tokenizer in {folder} cannot be loaded: {first_line} "
            f"It needs a {needed} that transformers can read."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"The tokenizer in {folder} is a {type(tokenizer).__name__}, which cannot say which "
            f"characters a token covers. A tokenizer.json is needed."
        )
    return tokenizer


def add_new_tokens(tokenizer: PreTrainedTokenizerFast, new_tokens: Sequence[str]) -> list[int]:
    """Make each text one special token; their ids. Errors: UserError for one that is known."""
    for token in new_tokens:
        if token in tokenizer.get_vocab():
            raise UserError(
                f"additional_special_tokens: {token!r} is a token of this model already. Remove it."
            )
        if not token.strip() or new_tokens.count(token) > 1:
            raise UserError(
                f"additional_special_tokens: {token!r} is empty or said twice. Remove it."
            )
    tokenizer.add_tokens(list(new_tokens), special_tokens=True)
    return [tokenizer.convert_tokens_to_ids(token) for token in new_tokens]


def template_names() -> list[str]:
    """The templates that come with the code."""
    return sorted(path.stem for path in shipped_folder("chat_templates").glob("*.jinja"))


def find_template(name_or_path: str) -> Path:
    """The file of a template: a name in chat_templates/ or a path."""
    shipped = shipped_folder("chat_templates") / f"{name_or_path}.jinja"
    if name_or_path in template_names():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    nearest = difflib.get_close_matches(name_or_path, template_names(), n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise UserError(
        f"chat_template: {name_or_path} is neither a file nor one of "
        f"{', '.join(template_names())}.{hint}"
    )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8. Save it as UTF-8.") from None


def save_chat_files(encoder: ChatEncoder, folder: str | Path) -> None:
    """Write tokenizer, chat_template.jinja and where generation stops into a model folder.

    Other keys of a generation_config.json that is already there are kept.
    """
    folder = Path(folder)
    encoder.tokenizer.chat_template = encoder.template
    encoder.tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings["eos_token_id"] = sorted(encoder.end_of_turn_ids)
    for key in ("bos_token_id", "pad_token_id"):
        number = getattr(encoder.tokenizer, key)
        if number is not None:
            settings[key] = number
    atomic_write(path, json.dumps(settings, indent=2) + "\n")

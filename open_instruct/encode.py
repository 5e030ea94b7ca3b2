"""Messages -> token ids and which of them are learnt. The only reader of chat_templates/.

    messages --template--> text, and who wrote each character --tokenizer--> ids, is_learnt

Text comes from transformers' own template engine and is tokenised in one call, so the ids are
those of ``tokenizer.apply_chat_template``. One thing differs on purpose: a control token opens or
closes a turn only where the template wrote it (control_tokens.py).
"""

import contextlib
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from olmo_base.run.artefact import atomic_write, resolve_model
from olmo_base.run.errors import UserError
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
from open_instruct.turns import Message, Tools

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # two names of one class
PLAIN_MODELS = ("olmo2", "olmo3")  # for which AutoTokenizer knows no other class
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

    def sample_text(self) -> str:
        """A short dialogue as the template writes it now."""
        return self._template.render(self._first_sample)

    def encode_dialogue(
        self, messages: Sequence[Message], *, tools: Tools | None = None
    ) -> Encoded:
        """A whole dialogue. Every assistant turn is learnt, with the token that ends it.

        Except those whose ``train`` is false.
        """
        return self.encode_many([messages], [tools])[0]

    def encode_many(
        self,
        dialogues: Sequence[Sequence[Message] | str],
        tools: Sequence[Tools | None] | None = None,
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
                else self._rendered(
                    item, callable_tools, learnt=learnt_turns(item, 0, learn_last_only)
                )
                for item, callable_tools in zip(
                    dialogues, tools or [None] * len(dialogues), strict=True
                )
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
        tokenizer = _tokenizer_class(folder).from_pretrained(folder)
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


def _tokenizer_class(folder: Path) -> Any:
    """What reads a folder's tokenizer as transformers' AutoTokenizer would.

    AutoTokenizer's import alone costs as much as that of all the rest of transformers that is used
    here, and the tokenizers of our own runs leave it no choice.
    """
    files = (folder / "tokenizer_config.json", folder / "config.json")
    if all(file.is_file() for file in files):
        said, model = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        is_plain = said.get("tokenizer_class") in PLAIN_TOKENIZERS and "auto_map" not in said
        if is_plain and model.get("model_type") in PLAIN_MODELS:
            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


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
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in new_tokens]


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

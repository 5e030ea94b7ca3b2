"""A chat template's text, and where in it each message stands.

    messages --placeholders for their texts--> the template's own text: frames
    frames, and the messages' texts between them --> who wrote each character

What a template writes around messages depends on their roles, and on the tools that are called;
so a layout is made once for each such shape and serves all dialogues that have it.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from olmo_base.run.errors import UserError
from open_instruct.control_tokens import CannotEncode, Rendered, Span
from open_instruct.turns import Message, Tools

# How a reasoning answer begins. Templates may open it themselves, so it is part of the shape.
THINK = "<think>"
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")  # private use characters: nobody's text


class ChatTemplate:
    """A Jinja chat template, with the values it takes from a tokenizer (``eos_token``, ...)."""

    def __init__(self, source: str, special_tokens: dict[str, Any], name: str) -> None:
        self.source = source
        self.name = name
        self.has_markers = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._special_tokens = special_tokens

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The dialogue as text. Errors: CannotEncode with what the template said against it."""
        return self._render(messages, tools, add_generation_prompt, with_marked=False)[0]

    def render_with_marked(
        self, messages: Sequence[Message], tools: Tools | None = None
    ) -> tuple[str, list[Span]]:
        """The text, and the characters between ``{% generation %}`` and ``{% endgeneration %}``."""
        return self._render(messages, tools, False, with_marked=True)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        add_generation_prompt: bool,
        with_marked: bool,
    ) -> tuple[str, list[Span]]:
        turns: list[Any] = [
            {key: value for key, value in turn.items() if key in ("role", "content", "tool_calls")}
            for turn in messages
        ]
        known_tools: Any = tools
        try:
            rendered: Any = render_jinja_template(
                [turns],
                tools=known_tools,
                chat_template=self.source,
                return_assistant_tokens_mask=with_marked,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.name}, line {error.lineno}: not a Jinja template: {error.message}."
            ) from None
        except jinja2.UndefinedError as error:
            raise CannotEncode(
                f"{self.name} needs what this tokenizer or dialogue does not have: {error}.",
                "refused by the chat template",
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise CannotEncode(
                f"{self.name} refuses this dialogue: {error}", "refused by the chat template"
            ) from None
        texts, spans = rendered
        return texts[0], spans[0] if with_marked else []


# ---------------------------------------------------------------- the shape of a dialogue


@dataclass(frozen=True)
class Shape:
    """A dialogue with placeholders for its texts, and those texts: its leaves.

    A message has one leaf for its content, and one for each function name and each argument that
    is text. Tools have one for each text that spells a control string.
    """

    messages: list[Message]
    tools: Tools | None
    leaves: list[str]
    owners: list[int]  # of each leaf: its message's number, -1 for tools
    are_quoted: list[bool]  # whether a leaf may stand inside JSON
    openings: list[str]  # of each message: what its content begins with that is no leaf
    key: Any  # equal for dialogues that a template writes with the same frames

    def slots_of(self, number: int, slots: Sequence[int]) -> tuple[int, int]:
        """The first and last place among ``slots`` where message ``number`` stands."""
        places = [place for place, slot in enumerate(slots) if self.owners[slot] == number]
        return places[0], places[-1]


def shape_of(
    messages: Sequence[Message], tools: Tools | None, spells_control: Callable[[str], Any]
) -> Shape:
    """The shape of a dialogue. Errors: CannotEncode if a name in it spells a control string."""
    shape = Shape([], None, [], [], [], [], None)

    def place(text: str, owner: int, is_quoted: bool) -> str:
        shape.leaves.append(text)
        shape.owners.append(owner)
        shape.are_quoted.append(is_quoted)
        return f"\ue000{len(shape.leaves) - 1}\ue001"

    def placed(value: Any, owner: int, is_wanted: Callable[[str], Any]) -> Any:
        if isinstance(value, str):
            return place(value, owner, True) if is_wanted(value) else value
        if isinstance(value, list):
            return [placed(item, owner, is_wanted) for item in value]
        if isinstance(value, dict):
            if any(spells_control(key) for key in value):
                raise CannotEncode(
                    f"a name in a tool or its call spells a control token: {', '.join(value)}.",
                    "spells a control token",
                )
            return {key: placed(item, owner, is_wanted) for key, item in value.items()}
        return value

    for number, turn in enumerate(messages):
        content = turn["content"]
        is_thinking = turn["role"] == "assistant" and content.startswith(THINK)
        opening = THINK if is_thinking else ""
        written = ""
        if content:
            written = opening + place(content[len(opening) :], number, turn["role"] == "tool")
        shaped: Message = {"role": turn["role"], "content": written}
        if "tool_calls" in turn:
            shaped["tool_calls"] = [
                {
                    "type": call["type"],
                    "function": {
                        "name": place(call["function"]["name"], number, True),
                        "arguments": placed(call["function"]["arguments"], number, bool),
                    },
                }
                for call in turn["tool_calls"]
            ]
        shape.messages.append(shaped)
        shape.openings.append(opening)
    shaped_tools = None if tools is None else placed(tools, -1, spells_control)
    if tools is None and not any("tool_calls" in turn for turn in messages):
        key: Any = tuple(
            (turn["role"], opening) for turn, opening in zip(messages, shape.openings, strict=True)
        )
    else:
        key = json.dumps([shape.messages, shaped_tools])
    return Shape(
        shape.messages,
        shaped_tools,
        shape.leaves,
        shape.owners,
        shape.are_quoted,
        shape.openings,
        key,
    )


def frames_of(
    template: ChatTemplate, shape: Shape, add_generation_prompt: bool = False
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The template's own text before, between and after the leaves, and the leaves in order."""
    text = template.render(shape.messages, shape.tools, add_generation_prompt)
    pieces = _PLACEHOLDER.split(text)
    slots = tuple(map(int, pieces[1::2]))
    is_complete = set(slots) == set(range(len(shape.leaves)))
    owned = [slot for slot in slots if is_complete and shape.owners[slot] >= 0]
    owners = [shape.owners[slot] for slot in owned]
    if not is_complete or len(set(owned)) < len(owned) or owners != sorted(owners):
        raise CannotEncode(
            f"{template.name} does not write every message of "
            f"{' → '.join(turn['role'] for turn in shape.messages)} once and in "
            "order, so it cannot be said which tokens are whose.",
            "rewritten by the chat template",
        )
    for tool in shape.tools or []:
        if str(tool.get("function", tool).get("name")) not in text:
            raise CannotEncode(
                f"{template.name} does not write the tools of a dialogue, so the model would not "
                "know what it may call. Use a template that does, such as chatml.",
                "tools not written by the chat template",
            )
    return tuple(pieces[0::2]), slots


def whole_text(frames: Sequence[str], slots: Sequence[int], number_of_slots: int) -> str:
    """The text up to and without the slot number ``number_of_slots``, placeholders in place."""
    written = [f"{frame}\ue000{slot}\ue001" for frame, slot in zip(frames, slots, strict=False)]
    return "".join(written[:number_of_slots]) + frames[number_of_slots]


def marked_around(template: ChatTemplate, shape: Shape) -> dict[int, tuple[int, int]]:
    """Of each assistant message, the characters inside the markers before and after it."""
    text, marked = template.render_with_marked(shape.messages, shape.tools)
    places = [(shape.owners[int(found[1])], found.span()) for found in _PLACEHOLDER.finditer(text)]
    around: dict[int, tuple[int, int]] = {}
    for start, end in marked:
        inside = [(owner, span) for owner, span in places if start <= span[0] and span[1] <= end]
        if len({owner for owner, _ in inside}) == 1:
            owner = inside[0][0]
            if len(inside) == sum(other == owner for other, _ in places):
                around[owner] = (inside[0][1][0] - start, end - inside[-1][1][1])
    assistants = [
        number for number, turn in enumerate(shape.messages) if turn["role"] == "assistant"
    ]
    if sorted(around) != assistants:
        raise CannotEncode(
            f"{template.name} does not have its {{% generation %}} markers around every "
            "assistant turn and nothing else.",
            "generation markers misplaced",
        )
    return around


# ---------------------------------------------------------------- frames and texts, found again


@dataclass(frozen=True)
class Learnt:
    """A message that is learnt, with some of the template's characters around it."""

    number: int
    first_slot: int
    last_slot: int
    before: int  # characters of the frame before the first slot
    after: int  # and of the one behind the last


@dataclass(frozen=True)
class Layout:
    """How a template writes a shape, whatever the messages say.

    ``frames[i]`` is the template's own text before slot i; the last frame ends the dialogue.
    """

    frames: tuple[str, ...]
    slots: tuple[int, ...]  # the leaf in each slot
    controls: tuple[list[Span], ...]  # the control strings in each frame
    learnt: tuple[Learnt, ...]  # every assistant message; none in a layout of prompts


def locate(text: str, shape: Shape, layout: Layout, learnt: Iterable[int]) -> Rendered | None:
    """The text with its learnt and control spans; None if it is not frames and leaves in turn.

    A template may trim the spaces around a message and write what is called as JSON; any other
    change makes None. ``learnt`` are the numbers of messages.
    """
    controls: list[Span] = []
    spans: list[Span] = []
    position = 0
    for place, frame in enumerate(layout.frames):
        if not text.startswith(frame, position):
            return None
        controls += [(position + a, position + b) for a, b in layout.controls[place]]
        position += len(frame)
        if place == len(layout.slots):
            break
        slot = layout.slots[place]
        for written in _ways_to_write(shape.leaves[slot], shape.are_quoted[slot]):
            end = position + len(written)
            if text.startswith(written, position) and text.startswith(
                layout.frames[place + 1], end
            ):
                break
        else:
            return None
        spans.append((position, end))
        position = end
    if position != len(text):
        return None
    wanted = set(learnt)
    return Rendered(
        text,
        [
            (spans[item.first_slot][0] - item.before, spans[item.last_slot][1] + item.after)
            for item in layout.learnt
            if item.number in wanted
        ],
        controls,
    )


def _ways_to_write(leaf: str, is_quoted: bool) -> Iterable[str]:
    yield from (leaf, leaf.strip(), leaf.lstrip(), leaf.rstrip())
    if is_quoted:
        for is_ascii in (False, True):
            quoted = json.dumps(leaf, ensure_ascii=is_ascii)
            yield from (quoted[1:-1], quoted, json.dumps(quoted, ensure_ascii=is_ascii)[1:-1])
            yield json.dumps(quoted[1:-1], ensure_ascii=is_ascii)[1:-1]

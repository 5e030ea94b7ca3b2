"""What a model can be asked: to say, to choose, to predict."""

from dataclasses import dataclass
from typing import Any

from open_instruct.examples import Message

# A document is judged in blocks, so that one long document too has a standard error, and so that
# models with different tokenizers are compared on the same pieces of text.
BLOCK_CHARACTERS = 4000


@dataclass(frozen=True)
class Question:
    """To be answered in words."""

    doc_id: str
    messages: tuple[Message, ...]  # the last one is the user's
    targets: tuple[str, ...]  # accepted answers
    category: str | None = None
    cluster: str | None = None  # what it shares with other questions: their passage, say
    truth: Any = None  # what a verifier compares the answer with


@dataclass(frozen=True)
class Choice:
    """To be answered by the likeliest of its options."""

    doc_id: str
    question: str  # for people; what the model reads are the contexts
    contexts: tuple[str, ...]  # one per option; usually all the same
    options: tuple[str, ...]  # continuations of the context, their leading blank included
    gold: int
    unconditional_contexts: tuple[str, ...] | None = None
    golds: tuple[int, ...] = ()  # all right ones, where there may be several
    category: str | None = None
    cluster: str | None = None
    messages: tuple[Message, ...] = ()  # what the model reads instead, in its chat template


@dataclass(frozen=True)
class Document:
    """To be predicted token by token."""

    doc_id: str
    text: str


@dataclass(frozen=True)
class Foreign:
    """Held by lm-eval, which puts the question and judges the answer."""

    doc_id: str


Item = Question | Choice | Document | Foreign

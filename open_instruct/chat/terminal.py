"""Talking with a model in the terminal: lines in, streamed answers out.

A line -> a turn of the conversation -> a voice (voices.py) -> text as it comes. Answers go to
standard output, everything else to standard error; a script can therefore pipe lines in and read
the answers. With two voices, each has a conversation of its own about the same questions.
"""

import contextlib
import dataclasses
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_base.run.errors import UserError
from open_instruct.chat.voices import Sampling, ServerVoice, TooLong, Voice, open_local

if TYPE_CHECKING:
    from open_instruct.examples import Message

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation; the system prompt stays",
    "/system TEXT": 'use this system prompt from now on; "" is none, no TEXT shows it',
    "/temperature N": "draw answers with this temperature; 0 takes the likeliest token",
    "/retry": "answer the last question again",
    "/undo": "forget the last question and its answer",
    "/save FILE": "add the conversation to FILE as one line of JSON that the sft stage reads",
    "/load FILE [N]": "go on with line N of such a file; without N the last",
    "/export FILE": "write the conversation to a new FILE as Markdown, to be read",
    "/quit": "leave (so does Ctrl-D)",
}
MARK = '"""'  # stands alone before and after a text of several lines
HELP = "\n".join(
    [
        *(f"{command:<15} {meaning}" for command, meaning in COMMANDS.items()),
        f"A text of several lines stands between two lines of {MARK}. At a terminal a line that",
        "ends with \\ goes on in the next, and the arrow keys bring back and change earlier ones.",
        "Ctrl-C stops an answer. A line that starts with // is sent with one slash.",
    ]
)


# ---------------------------------------------------------------- the conversation


@dataclass
class Conversation:
    """The turns so far. ``answer`` adds the user's turn and, when the answer ends, the model's."""

    voice: Voice
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    notify: Callable[[str], None] = lambda notice: None
    turns: "list[Message]" = field(default_factory=list)
    num_answers: int = 0  # moves the seed on: the same question twice may be answered in two ways

    def messages(self) -> "list[Message]":
        """The system prompt and all turns, as a dataset row's ``messages``."""
        system: list[Message] = []
        if self.system is not None:
            system.append({"role": "system", "content": self.system})
        return system + self.turns

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the model's answer to ``text``, as they come.

        Closing the iterator early (Ctrl-C) keeps what was said so far. Errors: UserError if the
        text alone does not fit the context; the conversation is then as it was.
        """
        return self._ask(list(self.turns), text)

    def retry(self) -> Generator[str, None, None]:
        """Pieces of a new answer to the last question; one without a word leaves the old.

        Errors: UserError if nothing was asked yet.
        """
        return self._ask(*self.before_last_question())

    def before_last_question(self) -> "tuple[list[Message], str]":
        """The turns before the last question, and that. Errors: UserError if there is none."""
        for index in reversed(range(len(self.turns))):
            if self.turns[index]["role"] == "user":
                return self.turns[:index], self.turns[index]["content"]
        raise UserError("Nothing was asked yet.")

    def _ask(self, earlier: "list[Message]", text: str) -> Generator[str, None, None]:
        before = self.turns
        self.turns = [*earlier, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            for piece in self._fitting_answer():
                said.append(piece)
                yield piece
        finally:
            if any(piece.strip() for piece in said):
                self.turns.append({"role": "assistant", "content": "".join(said)})
            else:
                self.turns = before  # a question without an answer would break the order of roles

    def _fitting_answer(self) -> Iterator[str]:
        """The answer; the oldest turns are dropped, with a notice, if need be."""
        num_dropped = 0
        while True:
            try:
                pieces = self.voice.answer(
                    self.messages(), self.sampling, self.sampling.seed + self.num_answers
                )
                break
            except TooLong as error:
                if len(self.turns) == 1:
                    raise
                context = error.context
            is_turn_start = [turn["role"] == "user" for turn in self.turns]
            self.turns = self.turns[is_turn_start.index(True, 1) :]
            num_dropped += 1
        self.num_answers += 1
        if num_dropped:
            what = "turn was" if num_dropped == 1 else f"{num_dropped} turns were"
            reads = (
                "the model reads"
                if context is None
                else f"the {context} tokens that the model reads"
            )
            self.notify(
                f"(The conversation is longer than {reads}: its oldest {what} dropped. "
                "/reset starts afresh.)"
            )
        return pieces


def save_conversation(messages: "list[Message]", path: str | Path) -> None:
    """Add a conversation to a JSON-lines file as ``{"messages": [...]}``.

    Errors: UserError if nothing was answered yet, or the file cannot be written.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("There is nothing to save yet: ask something first.")
    row = json.dumps({"messages": messages}, ensure_ascii=False).encode("utf-8")
    path = Path(path).expanduser()
    try:
        with open(path, "a+b") as file:
            if os.fstat(file.fileno()).st_size > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    row = b"\n" + row
            file.write(row + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def load_conversation(path: str | Path, number: int | None = None) -> "list[Message]":
    """The messages in line ``number``, from 1, of a JSON-lines file; None is the last line.

    Errors: UserError if there is no such line or it is no conversation that can go on.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8.") from None
    number = len(lines) if number is None else number
    if not 1 <= number <= len(lines):
        raise UserError(f"{path} has {len(lines)} lines, and no line {number}.")
    try:
        row = json.loads(lines[number - 1])
        messages: list[Message] = row["messages"]
        are_plain = all(
            message.keys() == {"role", "content"} and isinstance(message["content"], str)
            for message in messages
        )
        roles = [message["role"] for message in messages]
    except (ValueError, KeyError, TypeError, AttributeError):
        are_plain, roles = False, []
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or not are_plain or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"{path}, line {number}: needed a row of messages of role and content alone, in which "
            "user and assistant take turns, as /save writes it."
        )
    return messages


def export_conversations(conversations: Sequence["Conversation"], path: str | Path) -> None:
    """Write what was said to a new Markdown file. Errors: UserError if it cannot be, or exists."""
    if not any(conversation.turns for conversation in conversations):
        raise UserError("There is nothing to export yet: ask something first.")
    parts = []
    for conversation in conversations:
        parts.append(f"# A conversation with {conversation.voice.name}")
        for message in conversation.messages():
            parts += [f"## {message['role'].capitalize()}", message["content"]]
    path = Path(path).expanduser()
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write("\n\n".join(parts) + "\n")
    except FileExistsError:
        raise UserError(f"{path} exists. Name a new file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


# ---------------------------------------------------------------- lines in


def follow_command(conversations: Sequence[Conversation], line: str) -> bool:
    """Do what a line such as ``/reset`` says; False if it says to leave. Errors: UserError.

    ``/retry`` is followed by who shows answers.
    """
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    first = conversations[0]
    if word in ("/quit", "/exit"):
        return False
    if word == "/help":
        first.notify(HELP)
    elif word == "/reset":
        for conversation in conversations:
            conversation.turns = []
        first.notify("(A new conversation.)")
    elif word == "/system":
        for conversation in conversations:
            if rest:
                conversation.system = None if rest == '""' else rest
        first.notify(f"(System prompt: {first.system or 'none'})")
    elif word == "/temperature":
        for conversation in conversations:
            if rest:
                sampling = dataclasses.replace(conversation.sampling, temperature=_warmth(rest))
                conversation.sampling = sampling
        first.notify(f"(Temperature: {first.sampling.temperature:g})")
    elif word == "/undo":
        earlier = [conversation.before_last_question() for conversation in conversations]
        for conversation, (turns, _) in zip(conversations, earlier, strict=True):
            conversation.turns = turns
        first.notify(f"(Forgotten: {earlier[0][1]})")
    elif word == "/save":
        if not rest:
            raise UserError("/save needs a file: /save conversations.jsonl")
        for conversation in conversations:
            save_conversation(conversation.messages(), rest)
        lines = "one line" if len(conversations) == 1 else f"{len(conversations)} lines"
        first.notify(f"(Added to {rest} as {lines}.)")
    elif word == "/load":
        file, _, number = rest.rpartition(" ") if rest[-1:].isdigit() else (rest, "", "")
        if file == "" or not number.isdigit():
            file, number = rest, ""
        if not file:
            raise UserError("/load needs a file: /load conversations.jsonl")
        messages = load_conversation(file, int(number) if number else None)
        has_system = messages[0]["role"] == "system"
        for conversation in conversations:
            conversation.system = messages[0]["content"] if has_system else None
            conversation.turns = list(messages[has_system:])
        first.notify(f"(Going on after {messages[-2]['content']!r}.)")
    elif word == "/export":
        if not rest:
            raise UserError("/export needs a file: /export conversation.md")
        export_conversations(conversations, rest)
        first.notify(f"(Written to {rest}.)")
    else:
        known = [command.split()[0] for command in COMMANDS]
        near = get_close_matches(word, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known)}."
        raise UserError(
            f"{word} is not a command.{hint} Start the line with // to send it as text."
        )
    return True


def _warmth(text: str) -> float:
    try:
        temperature = float(text)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature <= 100:
        raise UserError(f"/temperature {text}: needed a number from 0 to 100, such as 0.7.")
    return temperature


def _typed_lines() -> Iterator[str]:
    """Texts typed at a terminal, with history and editing; ends at Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() its history
    while True:
        try:
            text = _typed("> ")
            if text.strip() == MARK:
                lines = []
                while (line := _typed(". ")).strip() != MARK:
                    lines.append(line)
                text = "\n".join(lines)
            else:
                while text.endswith("\\"):
                    text = text[:-1] + "\n" + _typed(". ")
            yield text
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves.)", file=sys.stderr)


def _typed(prompt: str) -> str:
    if not sys.stdout.isatty():  # where the answers go, input() would put the prompt among them
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    # A terminal may send bytes that are no UTF-8; Python hands them on as surrogates.
    return input(prompt).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _piped_lines() -> Iterator[str]:
    """Lines of a file or another program, or all lines between two marks."""
    block: list[str] | None = None
    for number, line_bytes in enumerate(sys.stdin.buffer, start=1):
        try:
            line = line_bytes.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"standard input, line {number}: not UTF-8.") from None
        if line.strip() == MARK:
            if block is None:
                block = []
                continue
            line, block = "".join(block), None
        if block is None:
            yield line
        else:
            block.append(line)
    if block is not None:
        raise UserError(
            f"standard input ends inside a text of several lines; its {MARK} is missing."
        )


# ---------------------------------------------------------------- answers out


def _show_answers(conversations: Sequence[Conversation], text: str | None) -> None:
    """Show the answer of each to ``text``; None asks the last question again.

    What is not answered by all, because it was stopped, say, is forgotten by all.
    """
    before = [conversation.turns for conversation in conversations]
    try:
        for conversation in conversations:
            if len(conversations) > 1:
                print(f"[{conversation.voice.name}]", flush=True)
            _show(conversation.retry() if text is None else conversation.answer(text))
            if conversation.voice.was_cut:
                conversation.notify(
                    "(The answer was cut: --max-new-tokens, or the context, ran out.)"
                )
    finally:
        now = [conversation.turns for conversation in conversations]
        if len(now) > 1 and any(turns is old for turns, old in zip(now, before, strict=True)):
            for conversation, old in zip(conversations, before, strict=True):
                conversation.turns = old
            conversations[0].notify("(Not all have answered: the question is forgotten.)")


def harmless(text: str) -> str:
    """Text without control characters: an answer must not move the cursor or retitle the window."""
    return "".join(
        character
        for character in text
        if character in "\n\t" or unicodedata.category(character) != "Cc"
    )


def _show(pieces: Generator[str, None, None]) -> None:
    with contextlib.closing(pieces):  # on Ctrl-C the conversation keeps what was said
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from open_instruct.chat.rendering import show_markdown  # heavy, only for people

            show_markdown(harmless(piece) for piece in pieces)
            return
        for piece in pieces:
            sys.stdout.write(harmless(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()


def chat(
    model: str | None,
    *,
    prompt: str | None = None,
    compare: str | None = None,
    url: str | None = None,
    adapter: str | None = None,
    load_in_4bit: bool = False,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
) -> None:
    """Talk with a model folder (or hub name): one question with ``prompt``, else line by line.

    ``url``: with a model of the server there; None is its first. ``compare``: with another one
    too. ``adapter`` is put on ``model``, whose default is the base that it names. Errors: UserError
    for a model that cannot chat; with piped input also for a line that cannot be answered. At a
    terminal such a line is explained and the conversation goes on.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    if model is None and url is None and adapter is None:
        raise UserError("Name a model to talk with, or a server with --url.")
    if url is not None and (adapter is not None or load_in_4bit):
        option = "--load-in-4bit" if adapter is None else "--adapter"
        raise UserError(f"{option} is for a model here; the server at {url} has chosen its own.")
    voices: list[Voice] = []
    if url is None:
        voices.append(open_local(model, adapter, load_in_4bit))
        if compare is not None:
            voices.append(open_local(compare, None, load_in_4bit))
    else:
        voices += [ServerVoice(url, name) for name in (model or "", compare) if name is not None]
    conversations = [
        Conversation(
            voice,
            Sampling(temperature, top_p, max_new_tokens, seed),
            system,
            notify=lambda notice: print(notice, file=sys.stderr, flush=True),
        )
        for voice in voices
    ]
    if prompt is not None:
        _show_answers(conversations, prompt)
        return
    notify = conversations[0].notify
    is_typed = sys.stdin.isatty()
    if is_typed:
        names = " and ".join(conversation.voice.name for conversation in conversations)
        notify(f"Talking with {names}. /help lists the commands, Ctrl-D leaves.")
    for line in _typed_lines() if is_typed else _piped_lines():
        text = line.strip()
        try:
            if text == "/retry":
                _show_answers(conversations, None)
            elif text.startswith("/") and not text.startswith("//"):
                if not follow_command(conversations, text):
                    return
            elif text:
                _show_answers(conversations, text.removeprefix("/") if text[:2] == "//" else text)
        except UserError as error:
            if not is_typed:
                raise
            notify(str(error))
        except KeyboardInterrupt:
            if not is_typed:
                raise
            notify("\n(Stopped.)")

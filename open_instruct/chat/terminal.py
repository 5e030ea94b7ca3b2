"""Talking with a model in the terminal: lines in, streamed answers out.

A line -> a turn of the conversation -> ids that fit the context -> tokens as they come -> text.
Answers go to standard output, everything else to standard error; a script can therefore pipe
lines in and read the answers.
"""

import contextlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from tokenizers.decoders import DecodeStream

from olmo_base.model.generate import Generator as TextGenerator
from olmo_base.model.generate import load_generator
from olmo_base.run.errors import UserError
from open_instruct.encode import ChatEncoder, load_chat_encoder
from open_instruct.examples import Message

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation; the system prompt stays",
    "/save FILE": "add the conversation to FILE as one line of JSON that the sft stage reads",
    "/quit": "leave (so does Ctrl-D)",
}
HELP = "\n".join(
    [
        *(f"{command:<12} {meaning}" for command, meaning in COMMANDS.items()),
        "Ctrl-C stops an answer. A line that starts with // is sent with one slash.",
    ]
)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 takes the likeliest token each time."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0


# ---------------------------------------------------------------- the conversation


@dataclass
class Conversation:
    """The turns so far. ``answer`` adds the user's turn and, when the answer ends, the model's."""

    generator: TextGenerator
    encoder: ChatEncoder
    sampling: Sampling = Sampling()
    system: str | None = None
    notify: Callable[[str], None] = lambda notice: None
    turns: list[Message] = field(default_factory=list)
    num_answers: int = 0  # moves the seed on: the same question twice may be answered in two ways
    was_cut: bool = False  # the last answer reached the limit before its end token

    def messages(self) -> list[Message]:
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
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            prompt = self._fitting_prompt()
            for piece in self._stream(prompt):
                said.append(piece)
                yield piece
        finally:
            if any(piece.strip() for piece in said):
                self.turns.append({"role": "assistant", "content": "".join(said)})
            else:
                self.turns = before  # a question without an answer would break the order of roles

    def _fitting_prompt(self) -> list[int]:
        """The ids of the conversation; its oldest turns are dropped, with a notice, if need be."""
        context = self.generator.max_length
        room = min(self.sampling.max_new_tokens, max(1, context // 4))  # kept free for the answer
        num_dropped = 0
        while len(ids := self.encoder.encode_prompt(self.messages())) > context - room:
            if len(self.turns) == 1:
                system = "" if self.system is None else " with the system prompt"
                raise UserError(
                    f"This message is {len(ids)} tokens long{system}; the model reads {context}, "
                    f"of which {room} are kept for the answer. Say it shorter."
                )
            is_turn_start = [turn["role"] == "user" for turn in self.turns]
            self.turns = self.turns[is_turn_start.index(True, 1) :]
            num_dropped += 1
        if num_dropped:
            what = "turn was" if num_dropped == 1 else f"{num_dropped} turns were"
            self.notify(
                f"(The conversation is longer than the {context} tokens that the model reads: "
                f"its oldest {what} dropped. /reset starts afresh.)"
            )
        return ids

    def _stream(self, prompt: list[int]) -> Iterator[str]:
        """Text as soon as it is whole: a character's bytes may be spread over several tokens."""
        self.was_cut = False
        limit = min(self.sampling.max_new_tokens, self.generator.max_length - len(prompt))
        stops = self.encoder.end_of_turn_ids | self.generator.eos_token_ids
        seed = self.sampling.seed + self.num_answers
        self.num_answers += 1
        backend = self.encoder.tokenizer.backend_tokenizer
        decoder = DecodeStream(skip_special_tokens=True)
        ids: list[int] = []
        shown = ""
        for token_id in self.generator.stream(
            prompt,
            max_new_tokens=limit,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=seed,
            stop_token_ids=tuple(sorted(stops)),
        ):
            if token_id in stops:
                break
            ids.append(token_id)
            piece = decoder.step(backend, token_id)
            if piece:
                shown += piece
                yield piece
        else:
            self.was_cut = len(ids) >= limit
        # Bytes that never became a whole character.
        whole = backend.decode(ids, skip_special_tokens=True)
        if len(whole) > len(shown) and whole.startswith(shown):
            yield whole[len(shown) :]


def save_conversation(messages: list[Message], path: str | Path) -> None:
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


# ---------------------------------------------------------------- lines in


def follow_command(conversation: Conversation, line: str) -> bool:
    """Do what a line such as ``/reset`` says; False if it says to leave. Errors: UserError."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word in ("/quit", "/exit"):
        return False
    if word == "/help":
        conversation.notify(HELP)
    elif word == "/reset":
        conversation.turns.clear()
        conversation.notify("(A new conversation.)")
    elif word == "/save":
        if not rest:
            raise UserError("/save needs a file: /save conversations.jsonl")
        save_conversation(conversation.messages(), rest)
        conversation.notify(f"(Added to {rest} as one line.)")
    else:
        known = [command.split()[0] for command in COMMANDS]
        near = get_close_matches(word, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known)}."
        raise UserError(
            f"{word} is not a command.{hint} Start the line with // to send it as text."
        )
    return True


def _typed_lines() -> Iterator[str]:
    """Lines typed at a terminal, with history and editing; ends at Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() its history
    while True:
        try:
            # A terminal may send bytes that are no UTF-8; Python hands them on as surrogates.
            yield input("> ").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves.)", file=sys.stderr)


def _piped_lines() -> Iterator[str]:
    """Lines of a file or another program."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"standard input, line {number}: not UTF-8.") from None


def _harmless(text: str) -> str:
    """Text without control characters: an answer must not move the cursor or retitle the window."""
    return "".join(
        character
        for character in text
        if character in "\n\t" or unicodedata.category(character) != "Cc"
    )


def _show_answer(conversation: Conversation, text: str) -> None:
    is_terminal = sys.stdout.isatty()
    pieces = conversation.answer(text)
    with contextlib.closing(pieces):  # on Ctrl-C the conversation keeps what was said
        for piece in pieces:
            sys.stdout.write(_harmless(piece) if is_terminal else piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if conversation.was_cut:
        conversation.notify("(The answer was cut: --max-new-tokens, or the context, ran out.)")


def chat(
    model: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
) -> None:
    """Talk with a model folder (or hub name): one question with ``prompt``, else line by line.

    Errors: UserError for a model that cannot chat; with piped input also for a line that cannot
    be answered. At a terminal such a line is explained and the conversation goes on.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    encoder = load_chat_encoder(model, None)
    conversation = Conversation(
        load_generator(model),
        encoder,
        Sampling(temperature, top_p, max_new_tokens, seed),
        system,
        notify=lambda notice: print(notice, file=sys.stderr, flush=True),
    )
    if prompt is not None:
        _show_answer(conversation, prompt)
        return
    is_typed = sys.stdin.isatty()
    if is_typed:
        conversation.notify(f"Talking with {model}. /help lists the commands, Ctrl-D leaves.")
    for line in _typed_lines() if is_typed else _piped_lines():
        text = line.strip()
        try:
            if text.startswith("/") and not text.startswith("//"):
                if not follow_command(conversation, text):
                    return
            elif text:
                _show_answer(conversation, text.removeprefix("/") if text[:2] == "//" else text)
        except UserError as error:
            if not is_typed:
                raise
            conversation.notify(str(error))
        except KeyboardInterrupt:
            if not is_typed:
                raise
            conversation.notify("\n(Stopped.)")

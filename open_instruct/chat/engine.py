"""Answers for many at once: requests join a running batch, and each gets what it would get alone.

    submit(prompt, Sampling, deliver) -> waits -> its prompt is read -> a row of the batch
        -> one token a step: logits -> penalties -> chance of its own -> text -> deliver(Delta)

One thread owns the model. ``submit`` and ``cancel`` may be called from any other; ``deliver`` is
called from the model's thread and must not block, and after all of a step's ``on_delivered``.

The same request with the same seed gives the same text whatever runs beside it: rows.py keeps
the logits the same to the last bit, and every request draws from a generator of its own.

R rows of a step, V vocabulary.
"""

import os
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from olmo_base.model.generate import Generator
from olmo_base.run.errors import UserError
from open_instruct.chat.forms import Forms, allow_only, has_ended
from open_instruct.chat.rows import MAX_ROWS, Batch, Reading, new_batch
from open_instruct.chat.sampling import Details, Sampling, chances, choose, penalise
from open_instruct.chat.slots import CHUNK
from open_instruct.chat.token_text import TextStream, Token, TokenNames

MAX_WAITING = 256  # answers that may wait for a row
READ_TOKENS = 4 * CHUNK  # of prompts between two steps: what the running answers wait for


# ---------------------------------------------------------------- what an answer says


@dataclass(frozen=True)
class Delta:
    """What became known of one answer."""

    index: int  # which of the answers to one prompt
    text: str
    tokens: tuple[Token, ...]  # those that made the text
    finish_reason: str | None = None  # stop: it ended by itself; length: max_tokens or the context
    error: str | None = None  # the whole request cannot go on; no more comes
    num_tokens: int = 0  # with a finish_reason: all tokens drawn, the one that ended it included


class QueueFull(Exception):
    """As many answers wait as may wait."""


class Closing(Exception):
    """The engine takes no more requests."""


@dataclass
class Answer:
    """One answer on its way, owned by the model's thread."""

    ticket: "Ticket"
    index: int
    row: Any
    chances: Iterator[float]
    text: "TextStream"
    num_tokens: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    matcher: Any = None  # of the form that it is held to, forms.py

    @property
    def changes_logits(self) -> bool:
        """Whether it is drawn by other numbers than the model's own."""
        return self.matcher is not None or self.ticket.sampling.changes_logits


# ---------------------------------------------------------------- requests


Deliver = Callable[[Delta], None]


class Ticket:
    """A request that was taken: its prompt, how to draw, and whether it is still wanted."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        num_answers: int,
        deliver: Deliver,
        stop_ids: set[int],
        matcher: Any,
    ) -> None:
        self.matcher = matcher
        self.stop_ids = stop_ids
        self.prompt = prompt
        self.sampling = sampling
        self.num_answers = num_answers
        self.deliver = deliver
        self.seed = (
            int.from_bytes(os.urandom(4), "little") if sampling.seed is None else sampling.seed
        )
        self.is_cancelled = False
        self.num_open = num_answers  # answers that have not ended


@dataclass
class Figures:
    """What an engine has done so far."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # by finish_reason, error or cancelled


class Engine:
    """One model with its thread. ``close`` ends it."""

    def __init__(
        self,
        generator: Generator,
        *,
        stop_ids: set[int] | frozenset[int] = frozenset(),
        max_rows: int = MAX_ROWS,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """``stop_ids`` end an answer beside the model's own end tokens."""
        self.generator = generator
        self.backend = generator.tokenizer.backend_tokenizer
        self.names = TokenNames(self.backend)
        self.stop_ids = generator.eos_token_ids | stop_ids
        self.forms = Forms(self.backend, generator.vocab_size, self.stop_ids)
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.max_length = generator.max_length
        self.figures = Figures()
        self.on_delivered: Callable[[], None] = lambda: None
        with torch.inference_mode():
            self.batch: Batch = new_batch(generator)
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._reading: list[tuple[Ticket, Reading]] = []
        self._answers: list[Answer] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------ from other threads

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        deliver: Deliver,
        num_answers: int = 1,
        matcher: Any = None,
    ) -> Ticket:
        """Ask for answers to one prompt, each with the seed's own chances for its number.

        ``matcher`` of ``forms`` holds each of them to a form.

        Errors: UserError for what this model cannot do, QueueFull, Closing.
        """
        self._check(prompt, sampling, num_answers)
        stop_ids = self._stop_ids(sampling.stop)
        ticket = Ticket(prompt, sampling, num_answers, deliver, stop_ids, matcher)
        with self._changed:
            if self._is_closing:
                raise Closing
            if self.num_waiting + num_answers > self.max_waiting:
                raise QueueFull
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _stop_ids(self, stop: Sequence[str]) -> set[int]:
        """What ends an answer to a request: a special token is also stopped at by its name."""
        return self.stop_ids | {id_ for id_, name in self.names.special.items() if name in stop}

    def _check(self, prompt: Sequence[int], sampling: Sampling, num_answers: int) -> None:
        if not 1 <= num_answers <= self.max_rows:
            raise UserError(f"n is {num_answers}; it must be from 1 to {self.max_rows}.")
        if not prompt:
            raise UserError("The prompt is empty; a model goes on from at least one token.")
        if len(prompt) + sampling.max_tokens > self.max_length:
            raise UserError(
                f"The prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}; "
                f"together they must not be more than {self.max_length}, the model's context. "
                "Shorten the prompt or lower max_tokens."
            )
        for id_ in (*prompt, *(id_ for id_, _ in sampling.logit_bias)):
            if not 0 <= id_ < self.generator.vocab_size:
                raise UserError(
                    f"The id {id_} is not one of the model's {self.generator.vocab_size} tokens."
                )

    def cancel(self, ticket: Ticket) -> None:
        """Its answers end before the next step; nothing more is delivered."""
        with self._changed:
            ticket.is_cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Take no more, drop what runs, and end the thread."""
        with self._changed:
            self._is_closing = True
            for ticket in self._tickets():
                ticket.is_cancelled = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Answers that have no row yet."""
        reading = [ticket for ticket, _ in self._reading]
        return sum(ticket.num_answers for ticket in (*self._waiting, *reading))

    @property
    def num_running(self) -> int:
        """Answers that have a row."""
        return len(self._answers)

    def _tickets(self) -> list[Ticket]:
        reading = [ticket for ticket, _ in self._reading]
        running = [answer.ticket for answer in self._answers]
        return list(dict.fromkeys([*self._waiting, *reading, *running]))

    # ------------------------------------------------ the model's thread

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closing or self._waiting or self._reading or self._answers
                )
                self._drop_cancelled()
                if self._is_closing:
                    return
                self._admit()
            try:
                self._read_prompts()
                self._step()
            except Exception as error:  # one bad call must not silence the server for all
                traceback.print_exc()
                self._fail_all(f"The model failed: {type(error).__name__}: {error}")

    def _drop_cancelled(self) -> None:
        for ticket in self._tickets():
            if ticket.is_cancelled:
                self.figures.finished["cancelled"] += ticket.num_open
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)
        self._reading = [item for item in self._reading if not item[0].is_cancelled]
        for answer in self._answers:
            if answer.ticket.is_cancelled:
                self.batch.leave(answer.row)
        self._answers = [answer for answer in self._answers if not answer.ticket.is_cancelled]

    def _admit(self) -> None:
        """Begin with waiting requests, first come first served, as long as rows are free."""
        taken = len(self._answers) + sum(ticket.num_answers for ticket, _ in self._reading)
        while self._waiting and taken + self._waiting[0].num_answers <= self.max_rows:
            ticket = self._waiting.popleft()
            taken += ticket.num_answers
            self.figures.prompt_tokens += len(ticket.prompt)
            self._reading.append((ticket, self.batch.read(ticket.prompt)))

    def _read_prompts(self) -> None:
        """Some chunks of the prompts that came first; those read to the end get their rows."""
        for _ in range(READ_TOKENS // CHUNK):
            if not self._reading:
                return
            ticket, reading = self._reading[0]
            logits_V = reading.advance()
            if logits_V is None:
                continue
            rows = self.batch.join(reading, ticket.num_answers)
            answers = [
                Answer(
                    ticket,
                    index,
                    row,
                    chances(ticket.seed, index),
                    TextStream(self.backend, ticket.sampling.stop),
                    matcher=ticket.matcher and ticket.matcher.deep_copy(),
                )
                for index, row in enumerate(rows)
            ]
            with self._changed:
                self._reading.pop(0)
                self._answers += answers
            self._extend(answers, logits_V.expand(len(answers), -1))

    def _step(self) -> None:
        if not self._answers:
            return
        answers = {answer.row: answer for answer in self._answers}
        rows, logits_RV = self.batch.step({row: one.text.ids[-1] for row, one in answers.items()})
        self.figures.steps += 1
        self._extend([answers[row] for row in rows], logits_RV)

    def _extend(self, answers: list[Answer], logits_RV: Tensor) -> None:
        """One more token for each answer; those that end leave the batch."""
        samplings = [answer.ticket.sampling for answer in answers]
        is_finite = logits_RV.float().sum(-1).isfinite().tolist()
        details = Details(logits_RV, samplings)
        scores_RV = logits_RV.float()
        changed = [row for row, answer in enumerate(answers) if answer.changes_logits]
        if changed:
            scores_RV = scores_RV.clone()
        for row in changed:
            penalise(scores_RV[row], samplings[row], answers[row].counts)
            if answers[row].matcher is not None and not allow_only(
                scores_RV[row], answers[row].matcher
            ):
                is_finite[row] = False
        uniform_R = [
            next(answer.chances) if sampling.temperature > 0 else 0.0
            for answer, sampling in zip(answers, samplings, strict=True)
        ]
        ids = choose(scores_RV, samplings, uniform_R).tolist()
        for row, answer in enumerate(answers):
            if not is_finite[row]:
                problem = NOT_FINITE if answer.matcher is None else f"{NOT_FINITE} {NO_FORM}"
                self._end(answer, Delta(answer.index, "", (), error=problem), "error")
            else:
                self._take(answer, details.token(row, ids[row]))
        with self._changed:
            self._answers = [answer for answer in self._answers if answer.row is not None]
        self.on_delivered()

    def _take(self, answer: Answer, token: Token) -> None:
        answer.num_tokens += 1
        if answer.ticket.sampling.changes_logits:
            answer.counts[token.id] += 1
        self.figures.generated_tokens += 1
        if token.id in answer.ticket.stop_ids:
            text, tokens = answer.text.finish()
            return self._end(answer, self._last(answer, text, tokens, "stop"), "stop")
        text, tokens, is_stopped = answer.text.push(token)
        if answer.matcher is not None and has_ended(answer.matcher, token.id) and not is_stopped:
            rest, more = answer.text.finish()
            return self._end(answer, self._last(answer, text + rest, tokens + more, "stop"), "stop")
        if is_stopped:
            return self._end(answer, self._last(answer, text, tokens, "stop"), "stop")
        if answer.num_tokens == answer.ticket.sampling.max_tokens:
            rest, more = answer.text.finish()
            last = self._last(answer, text + rest, tokens + more, "length")
            return self._end(answer, last, "length")
        if text or tokens:
            answer.ticket.deliver(Delta(answer.index, text, tokens))
        return None

    def _last(self, answer: Answer, text: str, tokens: tuple[Token, ...], reason: str) -> Delta:
        return Delta(answer.index, text, tokens, reason, num_tokens=answer.num_tokens)

    def _end(self, answer: Answer, delta: Delta, reason: str) -> None:
        self.batch.leave(answer.row)
        answer.row = None
        answer.ticket.num_open -= 1
        self.figures.finished[reason] += 1
        answer.ticket.deliver(delta)

    def _fail_all(self, message: str) -> None:
        """After an error of the model: end all that has begun, and go on with those that wait."""
        with self._changed:
            tickets = [*dict.fromkeys(item.ticket for item in self._answers)]
            tickets += [ticket for ticket, _ in self._reading]
            self._answers, self._reading = [], []
            self.batch.clear()
        for ticket in tickets:
            self.figures.finished["error"] += ticket.num_open
            ticket.deliver(Delta(0, "", (), error=message))
        self.on_delivered()


NOT_FINITE = (
    "The model's logits are not finite numbers: its weights are damaged, or its training "
    "diverged. Use an earlier checkpoint."
)
NO_FORM = "Or the form asked for by response_format is too complex."

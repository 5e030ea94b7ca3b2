"""Answers for many at once: requests join a running batch, and each gets what it would get alone.

    submit(prompt, Sampling, deliver) -> waits -> its prompt is read -> a row of the batch
        -> one token a step: logits -> penalties -> chance of its own -> text -> deliver(Delta)

One thread owns the model. ``submit`` and ``cancel`` may be called from any other; ``deliver`` is
called from the model's thread and must not block.

The same request with the same seed gives the same text whatever runs beside it: slots.py keeps
the logits the same to the last bit, and every request draws from a generator of its own.

R rows of a step, V vocabulary.
"""

import json
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
from open_instruct.chat.slots import CHUNK, MAX_ROWS, Batch, Reading, new_batch

MAX_WAITING = 256  # answers that may wait for a row
READ_TOKENS = 4 * CHUNK  # of prompts between two steps: what the running answers wait for
MAX_TOP_LOGPROBS = 20  # as OpenAI's API
CHANCES_AT_ONCE = 32


# ---------------------------------------------------------------- what a request says


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. Errors: UserError naming the value and what it may be.

    Applied in this order: ``logit_bias`` and the two penalties (on what was generated so far),
    temperature (0 takes the likeliest and ignores the rest), ``top_k`` (0 keeps all), ``top_p``,
    ``min_p`` (a token stays if it has this share of the likeliest one's probability).
    ``logprobs`` are the model's own, before all of these; None leaves them out.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: a new one each time
    logprobs: int | None = None  # how many alternatives to each token

    def __post_init__(self) -> None:
        allowed = (
            ("max_tokens", 1, None),
            ("temperature", 0, 100),
            ("top_k", 0, None),
            ("min_p", 0, 1),
            ("frequency_penalty", -2, 2),
            ("presence_penalty", -2, 2),
            ("logprobs", 0, MAX_TOP_LOGPROBS),
            ("seed", -(2**63), 2**63 - 1),
        )
        for name, low, high in allowed:
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                wanted = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UserError(f"{name} is {value}; it must be {wanted}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which would end every answer at once.")

    @property
    def changes_logits(self) -> bool:
        """Whether a bias or a penalty is added to the model's own."""
        return bool(self.logit_bias or self.frequency_penalty or self.presence_penalty)


@dataclass(frozen=True)
class Token:
    """A token of an answer; log-probabilities are the model's own, in nats."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()  # the likeliest, whether taken or not


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


# ---------------------------------------------------------------- choosing the next tokens


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


def choose(logits_RV: Tensor, samplings: Sequence[Sampling], uniform_R: Sequence[float]) -> Tensor:
    """The next id of each row, R. ``uniform_R`` in [0, 1) decides where it is drawn by chance.

    Every operation works on a row by itself, so that a row's choice depends on nothing else.
    """
    greedy: list[int] = []
    plain: list[int] = []
    cut: list[int] = []
    for row, sampling in enumerate(samplings):
        if sampling.temperature == 0:
            greedy.append(row)
        else:
            is_plain = sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0
            (plain if is_plain else cut).append(row)
    ids_R = torch.empty(len(samplings), dtype=torch.long, device=logits_RV.device)
    uniform = torch.tensor(uniform_R, device=logits_RV.device)

    def of(rows: list[int], name: str) -> Tensor:
        values = [getattr(samplings[row], name) for row in rows]
        return torch.tensor(values, device=logits_RV.device)[:, None]

    def scaled(rows: list[int]) -> Tensor:
        chosen_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
        return chosen_RV.float() / of(rows, "temperature")

    if greedy:
        ids_R[greedy] = logits_RV[greedy].argmax(-1)
    if plain:
        ids_R[plain] = _inverse_cdf(scaled(plain).softmax(-1), uniform[plain])
    if cut:
        values_RV, order_RV = scaled(cut).sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(values_RV.shape[1], device=values_RV.device)
        top_k_R1 = of(cut, "top_k")
        values_RV = values_RV.masked_fill((top_k_R1 > 0) & (rank_V >= top_k_R1), -torch.inf)
        p_RV = values_RV.softmax(-1)
        top_p_R1 = of(cut, "top_p")
        p_RV = p_RV.masked_fill(
            (top_p_R1 < 1) & (p_RV.cumsum(-1) - p_RV >= top_p_R1)
            | (p_RV < of(cut, "min_p") * p_RV[:, :1]),
            0.0,
        )
        places_R = _inverse_cdf(p_RV, uniform[cut])
        ids_R[cut] = order_RV.gather(-1, places_R[:, None]).squeeze(-1)
    return ids_R


def _inverse_cdf(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The index whose stretch of the cumulated weights holds ``uniform_R``; never a weight of 0."""
    cumulated_RV = weights_RV.cumsum(-1)
    total_R1 = cumulated_RV[:, -1:].contiguous()
    found_R1 = torch.searchsorted(cumulated_RV, uniform_R[:, None] * total_R1, right=True)
    last_R1 = torch.searchsorted(cumulated_RV, total_R1)  # rounding can reach the total
    return found_R1.minimum(last_R1).squeeze(-1)


def _penalise(logits_V: Tensor, sampling: Sampling, counts: Counter[int]) -> None:
    """Bias and penalties, in place: logit - frequency_penalty * count - presence_penalty."""
    for id_, bias in sampling.logit_bias:
        logits_V[id_] += bias
    if counts and (sampling.frequency_penalty or sampling.presence_penalty):
        ids = torch.tensor(list(counts), device=logits_V.device)
        number = torch.tensor(list(counts.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V[ids] -= sampling.frequency_penalty * number + sampling.presence_penalty


def _chances(seed: int, index: int) -> Iterator[float]:
    """Of answer ``index``, one for each token, as olmo_base's Generator draws them."""
    random = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    while True:
        yield from torch.rand(CHANCES_AT_ONCE, generator=random).tolist()


# ---------------------------------------------------------------- tokens -> text


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
                    _chances(ticket.seed, index),
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
        details = _Details(logits_RV, samplings)
        scores_RV = logits_RV.float()
        changed = [row for row, answer in enumerate(answers) if answer.changes_logits]
        if changed:
            scores_RV = scores_RV.clone()
        for row in changed:
            _penalise(scores_RV[row], samplings[row], answers[row].counts)
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


NOT_FINITE = (
    "The model's logits are not finite numbers: its weights are damaged, or its training "
    "diverged. Use an earlier checkpoint."
)
NO_FORM = "Or the form asked for by response_format is too complex."


# ---------------------------------------------------------------- log-probabilities


class _Details:
    """Log-probabilities of those rows of a step that asked for them."""

    def __init__(self, logits_RV: Tensor, samplings: Sequence[Sampling]) -> None:
        rows = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        self.places = {row: place for place, row in enumerate(rows)}
        self.numbers = {row: samplings[row].logprobs or 0 for row in rows}
        if rows:
            self.logprobs_RV = logits_RV[rows].float().log_softmax(-1)
            most = max(self.numbers.values())
            self.top_Rk, self.ids_Rk = self.logprobs_RV.topk(max(most, 1), -1)

    def token(self, row: int, id_: int) -> Token:
        """The chosen token of a row."""
        if row not in self.places:
            return Token(id_)
        place, number = self.places[row], self.numbers[row]
        ids = self.ids_Rk[place, :number].tolist()
        logprobs = self.top_Rk[place, :number].tolist()
        logprob = self.logprobs_RV[place, id_].item()
        return Token(id_, logprob, tuple(zip(ids, logprobs, strict=True)))

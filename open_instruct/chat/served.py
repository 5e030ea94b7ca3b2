"""A model that is served, and the answers to one request to it on their way.

protocol.Request -> Served.prompts: token ids -> Run: one ticket of the engine for each prompt
    -> Delta by Delta, carried from the engine's thread into the event loop
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from olmo_base.model.generate import Generator
from olmo_base.run.errors import UserError
from open_instruct.chat.echo import scored_tokens
from open_instruct.chat.engine import Closing, Delta, Engine, QueueFull
from open_instruct.chat.protocol import Request as Asked
from open_instruct.chat.refusals import ApiError
from open_instruct.chat.token_text import Token
from open_instruct.chat.tool_calls import BEGIN
from open_instruct.encode import ChatEncoder, load_chat_encoder

# ---------------------------------------------------------------- a model that is served


class Served:
    """A model with its engine and, if it was tuned on dialogues, its chat template."""

    def __init__(self, name: str, generator: Generator, max_waiting: int) -> None:
        self.name = name
        self.created = int(time.time())
        self.encoder: ChatEncoder | None = None
        self.no_chat = ""
        try:
            self.encoder = load_chat_encoder(generator.source or name, None)
            generator.tokenizer = self.encoder.tokenizer  # read once
        except UserError as error:
            self.no_chat = str(error)
        self.tokenizer = generator.tokenizer
        self.calls_tools = self._calls_tools()
        stop_ids = self.encoder.end_of_turn_ids if self.encoder else set()
        self.engine = Engine(generator, stop_ids=stop_ids, max_waiting=max_waiting)
        self.encoding = ThreadPoolExecutor(1, "encode")  # long prompts must not stop the server
        self.scoring = ThreadPoolExecutor(1, "score")
        self.first_token_seconds = 0.0
        self.num_first_tokens = 0

    def _calls_tools(self) -> bool:
        """Whether the template writes tools, and calls in a way that is seen in an answer."""
        template = self.encoder.template if self.encoder else ""
        added = self.tokenizer.added_tokens_decoder.values()
        is_hidden = any(token.special and token.content == BEGIN for token in added)
        return "tools" in template and BEGIN in template and not is_hidden

    async def matcher(self, asked: Asked) -> Any:
        """What holds the answers to a form; None where none is asked for. Errors: ApiError."""
        if asked.schema is None:
            return None
        loop = asyncio.get_running_loop()
        make = self.engine.forms.matcher
        try:
            return await loop.run_in_executor(self.encoding, make, asked.schema)
        except UserError as error:
            raise ApiError(
                400, str(error), param="response_format", code="unsupported_parameter"
            ) from None

    async def prompts(self, asked: Asked) -> list[list[int]]:
        """The token ids of each prompt. Errors: ApiError."""
        if asked.messages and self.encoder is None:
            raise ApiError(400, f"{self.no_chat} /v1/completions needs no template.", param="model")
        if asked.tools and not self.calls_tools:
            raise ApiError(
                400,
                f"tools: the chat template of {self.name} does not write tools, or not the "
                "<tool_call> by which calls are read here. Serve a model tuned with chatml.",
                param="tools",
                code="unsupported_parameter",
            )
        length = self.engine.max_length
        if len(asked.messages) > length:
            raise _too_long(f"There are {len(asked.messages)} messages", "messages", length)
        loop = asyncio.get_running_loop()
        try:
            prompts = await loop.run_in_executor(self.encoding, self._encode, asked)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None
        param = "messages" if asked.messages else "prompt"
        for prompt in prompts:
            limit = 1 if asked.max_tokens is None else asked.max_tokens
            if len(prompt) + limit > length:
                more = "" if asked.max_tokens is None else f" and asks for up to {limit} more"
                raise _too_long(f"The prompt has {len(prompt)} tokens{more}", param, length)
        return prompts

    async def scored(self, asked: Asked, prompt: list[int]) -> list[Token]:
        """A prompt's tokens and those after it, with their log-probabilities. Errors: ApiError."""
        return await asyncio.get_running_loop().run_in_executor(
            self.scoring,
            scored_tokens,
            self.engine.generator,
            prompt,
            asked.settings.get("logprobs", 0),
            asked.max_tokens or 0,
        )

    def _encode(self, asked: Asked) -> list[list[int]]:
        if asked.messages:
            assert self.encoder is not None
            return [self.encoder.encode_prompt(asked.messages, tools=asked.tools)]
        return [
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in asked.prompts
        ]


def _too_long(found: str, param: str, length: int) -> ApiError:
    return ApiError(
        400,
        f"{found}; this model's context holds {length}, the answer included. Shorten the "
        f"{param} or ask for fewer tokens.",
        param=param,
        code="context_length_exceeded",
    )


# ---------------------------------------------------------------- from the engine's thread to ours


class Mailbox:
    """Carries what engines deliver into the event loop, waking it once for all of a step.

    Woken by the first letter, the loop would take the interpreter from an engine that has the
    others still to write, and be woken again for them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, engines: Iterable[Engine]) -> None:
        self.loop = loop
        self.letters: deque[tuple[asyncio.Queue, Any]] = deque()
        self.is_woken = False
        for engine in engines:
            engine.on_delivered = self.wake

    def put(self, queue: asyncio.Queue, letter: Any) -> None:
        """From any thread; it lies there until ``wake``."""
        self.letters.append((queue, letter))

    def wake(self) -> None:
        """From any thread."""
        if not self.is_woken:
            self.is_woken = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self.is_woken = False  # before looking: what comes from now on wakes again
        while self.letters:
            queue, letter = self.letters.popleft()
            queue.put_nowait(letter)


class Run:
    """The answers to one HTTP request on their way. ``cancel`` it whatever happens."""

    def __init__(
        self,
        served: Served,
        asked: Asked,
        prompts: list[list[int]],
        mailbox: Mailbox,
        matcher: Any = None,
    ) -> None:
        self.served = served
        self.prompts = prompts
        self.num_answers = asked.num_answers
        self.queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self.num_open = len(prompts) * asked.num_answers
        self.num_completion_tokens = 0
        self.began = time.monotonic()
        self.tickets = []
        most = served.engine.max_waiting
        if self.num_open > most:
            raise ApiError(400, f"This asks for {self.num_open} answers; at most {most} can wait.")
        try:
            for place, prompt in enumerate(prompts):
                self.tickets.append(
                    served.engine.submit(
                        prompt,
                        asked.sampling(served.engine.max_length - len(prompt)),
                        self._delivery(place, mailbox),
                        asked.num_answers,
                        matcher,
                    )
                )
        except QueueFull:
            self.cancel()
            raise ApiError(
                429,
                f"{served.engine.num_waiting} answers wait already. Try again later.",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except Closing:
            raise closing() from None
        except UserError as error:
            self.cancel()
            raise ApiError(400, str(error)) from None

    def _delivery(self, place: int, mailbox: Mailbox) -> Callable[[Delta], None]:
        return lambda delta: mailbox.put(self.queue, (place, delta))

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(number of the choice, what became known of it) until all are finished.

        Errors: ApiError if the model failed.
        """
        is_first = True
        while self.num_open:
            place, delta = await self.queue.get()
            if is_first:
                self.served.first_token_seconds += time.monotonic() - self.began
                self.served.num_first_tokens += 1
                is_first = False
            if delta.error is not None:
                raise ApiError(500, delta.error, code="model_failed")
            if delta.finish_reason is not None:
                self.num_open -= 1
                self.num_completion_tokens += delta.num_tokens
            yield place * self.num_answers + delta.index, delta

    def cancel(self) -> None:
        """Nothing more of it is computed. Harmless where all is finished."""
        for ticket in self.tickets:
            if ticket.num_open:
                self.served.engine.cancel(ticket)

    def usage(self) -> dict[str, int]:
        """Token counts in OpenAI's shape; an end token counts as generated."""
        num_prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt + self.num_completion_tokens,
        }


def closing() -> ApiError:
    """The refusal of a server that is stopping."""
    return ApiError(
        503, "The server is stopping and takes no new requests.", code="shutting_down",
        headers={"Connection": "close"},
    )  # fmt: skip

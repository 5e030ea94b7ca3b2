"""Who answers in a conversation: a model in this process, or one on a running server.

A voice takes messages and gives pieces of text as they come. That a conversation is too long for
it is said before the first piece, so that the caller can shorten it.
"""

import http.client
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from tokenizers.decoders import DecodeStream

from olmo_base.run.errors import UserError

if TYPE_CHECKING:  # heavy, and not for a model on a server
    from olmo_base.model.generate import Generator as TextGenerator
    from open_instruct.encode import ChatEncoder
    from open_instruct.examples import Message

API_KEY_VARIABLE = "OPEN_INSTRUCT_API_KEY"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 takes the likeliest token each time."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0


class TooLong(UserError):
    """The messages and room for an answer do not fit the context."""

    def __init__(self, message: str, context: int | None) -> None:
        super().__init__(message)
        self.context = context  # in tokens


class Voice(Protocol):
    """What answers."""

    name: str
    was_cut: bool  # the last answer reached a limit before it ended by itself

    def answer(self, messages: "Sequence[Message]", sampling: Sampling, seed: int) -> Iterator[str]:
        """Pieces of the answer. Errors: TooLong, at the call; UserError."""


def room_for_an_answer(sampling: Sampling, context: int) -> int:
    """Tokens of the context that are kept free for the answer, at the least."""
    return min(sampling.max_new_tokens, max(1, context // 4))


# ---------------------------------------------------------------- a model in this process


@dataclass
class LocalVoice:
    """A model here."""

    generator: "TextGenerator"
    encoder: "ChatEncoder"
    name: str = ""
    was_cut: bool = False

    def answer(self, messages: "Sequence[Message]", sampling: Sampling, seed: int) -> Iterator[str]:
        context = self.generator.max_length
        room = room_for_an_answer(sampling, context)
        ids = self.encoder.encode_prompt(messages)
        if len(ids) > context - room:
            system = " with the system prompt" if messages[0]["role"] == "system" else ""
            raise TooLong(
                f"This message is {len(ids)} tokens long{system}; the model reads {context}, "
                f"of which {room} are kept for the answer. Say it shorter.",
                context,
            )
        return self._stream(ids, sampling, seed)

    def _stream(self, prompt: list[int], sampling: Sampling, seed: int) -> Iterator[str]:
        """Text as soon as it is whole: a character's bytes may be spread over several tokens."""
        self.was_cut = False
        limit = min(sampling.max_new_tokens, self.generator.max_length - len(prompt))
        stops = self.encoder.end_of_turn_ids | self.generator.eos_token_ids
        backend = self.encoder.tokenizer.backend_tokenizer
        decoder = DecodeStream(skip_special_tokens=True)
        ids: list[int] = []
        shown = ""
        for token_id in self.generator.stream(
            prompt,
            max_new_tokens=limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
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


def open_local(name: str | None, adapter: str | None = None, in_4bit: bool = False) -> LocalVoice:
    """A model of this machine, with an adapter put on it if one is named.

    ``name`` None is the base that the adapter names. Errors: UserError.
    """
    from olmo_base.model.generate import (  # heavy: not for a server's models
        Generator,
        context_length,
        end_token_ids,
        load_generator,
    )
    from olmo_base.run.artefact import adapter_base, resolve_base, resolve_model
    from olmo_base.run.launch import pick_device
    from open_instruct.encode import load_chat_encoder

    folder = None if adapter is None else resolve_model(adapter)
    if folder is not None and (base := adapter_base(folder)) is None:
        raise UserError(f"--adapter {folder} is no adapter. Talk with it as MODEL.")
    if name is None:
        assert folder is not None and base is not None
        name = str(resolve_base(folder, base))
    source = resolve_model(name)
    if in_4bit:
        from open_instruct.causal_lm import load_in_4bit

        model = load_in_4bit(name, folder, pick_device())
        ends = (folder and end_token_ids(folder)) or end_token_ids(source)
        limit = context_length(model.config.get_text_config(decoder=True))
        has_tokenizer = folder is not None and (folder / "tokenizer.json").is_file()
        place = folder if has_tokenizer else source
        generator = Generator(model, eos_token_ids=ends, max_length=limit, source=place)
    else:
        generator = load_generator(name)
        if folder is not None:
            from open_instruct.chat.beside import beside

            generator = beside(generator, folder, end_token_ids(folder))
    encoder = load_chat_encoder(generator.source or name, None)
    shown = name if adapter is None else f"{name} with {adapter}"
    return LocalVoice(generator, encoder, shown)


# ---------------------------------------------------------------- a model on a running server


@dataclass
class ServerVoice:
    """A model behind an OpenAI-compatible API, this package's or another's.

    ``url`` with or without ``/v1``; the key is taken from OPEN_INSTRUCT_API_KEY. ``name`` empty is
    the first model that the server names. Errors: UserError if it cannot be reached or does not
    serve the model.
    """

    url: str
    name: str = ""
    was_cut: bool = False
    context: int | None = field(default=None, init=False)  # in tokens, if the server says it

    def __post_init__(self) -> None:
        parts = urlsplit(self.url if "://" in self.url else f"http://{self.url}")
        try:
            is_known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:  # a port that is no number
            is_known = False
        if not is_known:
            raise UserError(f"{self.url} is no address. Needed: one like http://127.0.0.1:8000.")
        self._parts = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        response = self._ask("GET", "/models", None)
        served = self._decoded(response.read()).get("data") or []
        self._connection.close()
        cards = {str(card.get("id")): card for card in served if isinstance(card, dict)}
        self.name = self.name or next(iter(cards), "")
        if self.name not in cards:
            names = ", ".join(cards) or "nothing"
            raise UserError(
                f"{self.url} does not serve {self.name or 'any model'}. It serves {names}."
            )
        context = cards[self.name].get("max_model_len")
        self.context = context if isinstance(context, int) else None

    def answer(self, messages: "Sequence[Message]", sampling: Sampling, seed: int) -> Iterator[str]:
        limits = [sampling.max_new_tokens]
        if self.context is not None:
            limits.append(room_for_an_answer(sampling, self.context))
        for limit in limits:
            body = {
                "model": self.name,
                "messages": list(messages),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": limit,
                "seed": seed,
                "stream": True,
            }
            try:
                response = self._ask("POST", "/chat/completions", body)
            except TooLong:
                if limit == limits[-1]:
                    raise
                continue
            return self._stream(response)
        raise AssertionError("the last limit returns or raises")

    def _ask(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        """The response, not yet read. Errors: UserError, with the server's own words."""
        parts = self._parts
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        self._connection = kind(parts.hostname or "", parts.port)
        content = None if body is None else json.dumps(body).encode()
        try:
            self._connection.request(method, self._path + path, content, headers)
            response = self._connection.getresponse()
            if response.status == 200:
                return response
            refusal = response.read()
            self._connection.close()
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{self.url} cannot be reached ({reason}). Start one: open-instruct serve MODEL."
            ) from None
        raise self._refused(response.status, refusal)

    def _refused(self, status: int, content: bytes) -> UserError:
        error = self._decoded(content).get("error")
        if not isinstance(error, dict):
            return UserError(
                f"{self.url} answered with status {status}. Is it an OpenAI-compatible API?"
            )
        message = str(error.get("message"))
        if error.get("code") == "context_length_exceeded":
            return TooLong(f"{self.url}: {message}", self.context)
        more = f" Put the key into {API_KEY_VARIABLE}." if status == 401 else ""
        return UserError(f"{self.url}: {message}{more}")

    def _decoded(self, content: bytes) -> dict[str, Any]:
        try:
            decoded = json.loads(content)
        except ValueError:
            decoded = None
        return decoded if isinstance(decoded, dict) else {}

    def _stream(self, response: http.client.HTTPResponse) -> Iterator[str]:
        """The text of server-sent events. Leaving early closes the connection, which stops it."""
        self.was_cut = False
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = self._decoded(data)
                if "error" in event:
                    raise self._refused(200, data)
                for choice in event.get("choices") or []:
                    self.was_cut |= choice.get("finish_reason") == "length"
                    if piece := (choice.get("delta") or {}).get("content"):
                        yield piece
            raise UserError(f"{self.url} ended its answer too early.")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url} was lost in the middle of its answer ({error}).") from None
        finally:
            response.close()
            self._connection.close()

"""An OpenAI-compatible server, and the chat page, from start to end.

    model folders -> served.py: a model with its engine -> app.py behind guard.py -> uvicorn

Nothing leaves this machine but answers to requests: no telemetry, no fonts or scripts from
elsewhere. A browser's other pages are kept out: no CORS unless asked, foreign origins and foreign
host names are refused, and only JSON bodies are read.
"""

import os
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from olmo_base.model.generate import Generator, end_token_ids, load_generator
from olmo_base.run.artefact import adapter_base, resolve_base, resolve_model
from olmo_base.run.errors import UserError
from open_instruct.chat.app import Server, new_app
from open_instruct.chat.beside import beside
from open_instruct.chat.engine import MAX_WAITING
from open_instruct.chat.guard import Settings
from open_instruct.chat.hosts import is_loopback
from open_instruct.chat.served import Served
from open_instruct.chat.voices import API_KEY_VARIABLE

SMALL_MODEL = 10_000_000  # weights; a step of one row is then below a few milliseconds
ONE_BY_ONE = (
    "answers are computed one row at a time, which is slow for many clients. Either the model "
    "keeps more than keys and values, or this machine's products change with the size of a batch, "
    "and a seeded answer would depend on who else asks."
)


class Uvicorn(uvicorn.Server):
    """Ends when running answers have ended; a second signal ends at once."""

    def __init__(self, server: Server) -> None:
        config = uvicorn.Config(
            new_app(server), log_level="warning", access_log=False, server_header=False
        )
        super().__init__(config)
        self.ours = server
        server.on_idle = self._leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by SIGTERM and SIGINT."""
        server = self.ours
        if server.is_closing:
            super().handle_exit(sig, frame)
            return
        server.is_closing = True
        if server.num_active == 0:
            self._leave()
        else:
            print(f"Stopping after {server.num_active} running requests.", file=sys.stderr)

    def _leave(self) -> None:
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound but not yet served. Errors: UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened at: {error.strerror}. Choose another --port or "
            "--host, or end what listens there."
        ) from None
    return bound


def load_models(names: Sequence[str], max_waiting: int = MAX_WAITING) -> dict[str, Served]:
    """Each model with its engine, under the name that was given. Errors: UserError."""
    folders: dict[str, Path] = {}
    for name in (name.rstrip("/") or name for name in names):
        if name in folders:
            raise UserError(f"{name} is given twice. Give each model once.")
        folders[name] = resolve_model(name)
    generators = _load_generators(folders)
    if all(_is_small(generator.model) for generator in generators.values()):
        torch.set_num_threads(1)  # threads would wait for each other longer than they compute
    return {name: Served(name, generator, max_waiting) for name, generator in generators.items()}


def _load_generators(folders: dict[str, Path]) -> dict[str, Generator]:
    """A generator for each folder. Adapters share their base with it and with each other."""
    bases: dict[str, Path] = {}
    for name, folder in folders.items():
        if (base := adapter_base(folder)) is not None:
            bases[name] = resolve_base(folder, base).resolve()
    users = Counter([*bases.values(), *(folder.resolve() for folder in folders.values())])
    loaded: dict[Path, Generator] = {}
    generators: dict[str, Generator] = {}
    for name, folder in folders.items():
        place = bases.get(name, folder.resolve())
        if name in bases and users[place] == 1:
            generators[name] = load_generator(folder)  # merged: nobody else needs the base
            continue
        if place not in loaded:
            loaded[place] = load_generator(place)
        if name in bases:
            generators[name] = beside(loaded[place], folder, end_token_ids(folder))
        else:
            generators[name] = loaded[place]
    return generators


def _is_small(model: torch.nn.Module) -> bool:
    return sum(weight.numel() for weight in model.parameters()) < SMALL_MODEL


def serve(names: Sequence[str], settings: Settings) -> None:
    """Serve models until SIGTERM or Ctrl-C. Errors: UserError."""
    # MKL's products of a row otherwise change with the rows beside it as soon as there are two
    # threads. It reads this at its first product; rows.py would go back to one row at a time.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    key = settings.api_key or os.environ.get(API_KEY_VARIABLE)
    if not settings.votes.parent.is_dir():
        raise UserError(f"--votes {settings.votes}: there is no folder {settings.votes.parent}.")
    bound = listen(settings.host, settings.port)
    is_new_key = key is None and not is_loopback(settings.host)
    key = secrets.token_urlsafe(32) if is_new_key else key
    settings = Settings(**{**settings.__dict__, "api_key": key})
    server = Server(load_models(names, settings.max_waiting), settings)
    for served in server.models.values():
        if served.engine.batch.stable_sizes == (1,):
            print(f"{served.name}: {ONE_BY_ONE}", file=sys.stderr)
        if served.no_chat:
            print(f"{served.name}: /v1/completions only. {served.no_chat}", file=sys.stderr)
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if is_new_key:
        print(f"API key, shown this once: {key}", file=sys.stderr)
    print(
        f"Serving {', '.join(server.models)} at http://{shown}:{port}", file=sys.stderr, flush=True
    )
    uvicorn_server = Uvicorn(server)
    try:
        uvicorn_server.run(sockets=[bound])
    finally:
        server.close()

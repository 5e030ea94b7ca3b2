"""A server that is really running, with a tiny model, for the tests of the API and of the page."""

import http.client
import json
import threading
from pathlib import Path
from typing import Any

import openai

from open_instruct.chat.app import Server
from open_instruct.chat.guard import Settings
from open_instruct.chat.server import Uvicorn, listen, load_models
from open_instruct.encode import load_chat_encoder, save_chat_files
from tests.open_instruct.tiny import save_tiny_model


def save_chat_model(folder: Path, seed: int = 0, context: int = 640, width: int = 32) -> str:
    """A tiny random model with the tulu template."""
    save_tiny_model(folder, seed, hidden_size=width, max_position_embeddings=context)
    save_chat_files(load_chat_encoder(folder, "tulu"), folder)
    return str(folder)


class Running:
    """A server on a free port of this machine, in a thread."""

    def __init__(self, names: list[str], **settings: Any) -> None:
        self.bound = listen("127.0.0.1", 0)
        self.bound.listen(128)  # clients wait until it serves
        self.port = self.bound.getsockname()[1]
        self.server = Server(load_models(names), Settings(**settings))
        self.uvicorn = Uvicorn(self.server)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.bound]})
        self.thread.start()
        self.name = names[0]

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()
        self.server.close()

    def client(self, api_key: str = "none") -> openai.OpenAI:
        base_url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, decoded body and headers, by the standard library."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content, {"Content-Type": "application/json"} | headers)

    def ask(
        self, method: str, path: str, content: bytes | None = None, headers: Any = None
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        is_json = response.getheader("Content-Type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text, dict(response.headers)

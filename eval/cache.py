"""What a model said to each request, kept on disk: nothing is computed twice, across kills too.

One file for each model: lines of key, checksum and value, only ever added to. The name of the file
stands for the model's weights, tokenizer, template and precision; the key of a line for everything
else that decides the value. So two models share no line, and a changed request finds none.
"""

import fcntl
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CACHE_VERSION = 1  # raise it when the same request would be computed differently


def fingerprint(**facts: Any) -> str:
    """A name for these facts: other facts have another."""
    content = json.dumps({"version": CACHE_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def request_key(kind: str, ids: Iterable[Sequence[int]], settings: Mapping[str, Any]) -> str:
    """The key of a request: lists of token ids, and whatever else decides its value."""
    digest = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode())
    for part in ids:
        digest.update(b"%d:" % len(part))  # where one list ends and the next begins
        digest.update(array("q", part).tobytes())
    return digest.hexdigest()[:32]


def _checksum(key: str, value: str) -> str:
    return f"{zlib.crc32(f'{key} {value}'.encode()):08x}"


class RequestCache:
    """The requests of one model that were computed before.

    Several processes may use one file: each line is added whole, under a lock. What another
    process adds is seen by those that open the file afterwards.
    """

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one; ``num_damaged`` lines of it are left out."""
        self.path = path
        self.num_damaged = 0
        self._values: dict[str, str] = {}  # as JSON: few of a large file are asked for
        path.parent.mkdir(parents=True, exist_ok=True)
        # Append mode: another process may have added lines since.
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):  # a process was killed while writing
                os.write(self._file, b"\n")
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        for line in content.split(b"\n"):
            if line:
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            key, checksum, value = line.decode().split(" ", 2)
        except ValueError:
            self.num_damaged += 1
            return
        if checksum == _checksum(key, value):
            self._values[key] = value
        else:
            self.num_damaged += 1

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._values[key])

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep values (of what JSON can hold) by their keys."""
        texts = {key: json.dumps(value) for key, value in values.items()}
        lines = [f"{key} {_checksum(key, text)} {text}\n" for key, text in texts.items()]
        data = "".join(lines).encode()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._values |= texts

    def close(self) -> None:
        """Flush the file to disk and let go of it."""
        os.fsync(self._file)
        os.close(self._file)

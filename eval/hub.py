"""A task's data set on the Hugging Face hub -> the file that the task reads."""

import functools
import gzip
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from olmo_base.run.artefact import atomic_write
from olmo_base.run.errors import UserError


def is_offline() -> bool:
    """Whether the environment forbids to ask the hub."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


@functools.cache
def is_reachable() -> bool:
    """Whether a machine answers at the hub's address: its own client tries for half a minute."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # a proxy knows the way
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname or "", address.port or 443), 5).close()
    except OSError:
        return False
    return True


def fetch(place: str, target: Path) -> None:
    """Write the rows of "NAME CONFIG SPLIT" (CONFIG may be -) as JSON lines; a folder may be NAME.

    Errors: UserError that says why it could not be had.
    """
    name, config, split = place.split()
    if is_offline() and not Path(name).is_dir():
        raise UserError(f"It is the split {split} of {name} on the hub, and HF_HUB_OFFLINE is set.")
    if not Path(name).is_dir() and not is_reachable():
        raise UserError(
            f"It is the split {split} of {name} on the hub, which cannot be reached from here."
        )
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"It is the split {split} of {name} on the hub; to fetch it, "
            "pip install 'open-instruct[eval]'."
        )
    from datasets import load_dataset  # optional, and takes seconds

    print(f"Fetching {name} ({split}) from the hub into {target}", file=sys.stderr)
    try:
        # As a stream, so that no second copy stays in a cache; never with code of the data set's.
        rows = load_dataset(name, None if config == "-" else config, split=split, streaming=True)
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    except Exception as error:  # the network's, the hub's and the data set's
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"It is the split {split} of {name} on the hub, which could not be read "
            f"({type(error).__name__}: {words})."
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    atomic_write(target, gzip.compress(data, mtime=0) if target.suffix == ".gz" else data)

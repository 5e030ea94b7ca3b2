"""The process a run lives in: its rank, device, seeds, signals, and the facts about its machine."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch

OTHERS_WAIT_S = 5.0  # torchrun looks at its processes ten times a second
RECORDED_PACKAGES = (
    "open-instruct",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "numpy",
)


@dataclass(frozen=True)
class Launch:
    """The processes that a plan is made for, where it is not this one alone."""

    num_processes: int = 1
    device: Literal["cpu", "cuda"] = "cuda"
    divides: bool = False  # tuning: weights, gradients and moments, over all of them
    releases: bool = True  # then: a layer is gathered again for its backward pass

    @property
    def shards(self) -> int:
        """Into how many parts tuning divides weights."""
        return self.num_processes if self.divides else 1


def is_main_process() -> bool:
    """Whether this is the first rank (torchrun and accelerate set RANK), or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_prefix() -> str:
    """What the error that ends this process begins with: nothing, or a later rank's number.

    The first rank mostly tells the same, whereupon the launcher ends the others: so they wait.
    """
    if is_main_process():
        return ""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # to be ended without another word
    time.sleep(OTHERS_WAIT_S)
    return f"rank {os.environ['RANK']}: "


def pick_device() -> torch.device:
    """This rank's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (all GPUs)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and that of every package that can change a result."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def source_commit() -> str | None:
    """The git commit this code runs from, with ``-dirty`` if files differ; None if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        # Without the optional lock: a run killed here must not leave .git/index.lock behind.
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        is_dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return git("rev-parse", "HEAD") + ("-dirty" if is_dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and GPUs."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    with contextlib.suppress(ValueError, OSError):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        facts["gpus"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    return facts


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class StopFlag:
    """Set by a signal, read by a loop after each optimizer step."""

    def __init__(self) -> None:
        self.signal_number = 0

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the loop to end."""
        return self.signal_number != 0


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 ask for an end instead of killing.

    The loop looks at ``flag.requested`` after each step, saves a checkpoint and raises
    ``Stopped(flag.signal_number)``. A second Ctrl-C interrupts at once.
    """
    flag = StopFlag()

    def ask(signal_number: int, frame: FrameType | None) -> None:
        if flag.requested and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal_number = signal_number

    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, ask) for number in asking}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""The watch over a run's ranks: when one makes no progress for too long, say which, and end.

A rank that hangs leaves the others waiting in a collective without a word. Each rank's watch tells
the others how far it has come, from a thread of its own, and looks at them when it stands still.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist

EXIT_CODE = 1


class Progress(NamedTuple):
    """How far a rank is: its step, and whether it has come to where the ranks meet."""

    step: int
    waits: bool


class Watch:
    """Told by the loop how far it is; ends the process when a rank hangs."""

    def __init__(self, limit_s: float, title: str) -> None:
        """``title`` says what the ranks do, for the message."""
        self._limit_s, self._title = limit_s, title
        self._now = Progress(0, False)
        self._since = time.monotonic()
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._done = threading.Event()

    def at(self, step: int, *, waits: bool = False) -> None:
        """The loop has come to this step; ``waits`` when it is about to wait for all ranks."""
        self._now, self._since = Progress(step, waits), time.monotonic()

    def still_moves(self) -> None:
        """Long work goes on within a step."""
        self._since = time.monotonic()

    def look(self, store: dist.Store) -> str | None:
        """Tell the others how far this rank is; what to say if a rank hangs, None if none does."""
        idle_s = time.monotonic() - self._since
        now = self._now
        store.set(f"watch/{self._rank}", f"{now.step} {int(now.waits)}")
        if idle_s < self._limit_s:
            return None
        found: dict[int, Progress] = {}
        for rank in range(self._num_ranks):
            if store.check([f"watch/{rank}"]):
                step, waits = store.get(f"watch/{rank}").decode().split()
                found[rank] = Progress(int(step), bool(int(waits)))
        slowest = min(found.values())
        hung = [rank for rank in found if found[rank] == slowest]
        hung += [rank for rank in range(self._num_ranks) if rank not in found]
        speaker = min(set(range(self._num_ranks)) - set(hung), default=0)
        if self._rank != speaker:
            return ""
        names = ", ".join(map(str, sorted(hung)))
        return (
            f"{self._title}: rank {names} of {self._num_ranks} has made no progress for "
            f"{idle_s:.0f} s in step {slowest.step + 1}, and the others wait for it. Look at "
            "that rank's machine and its output, then run the recipe again: it goes on from its "
            "last checkpoint. If a step may take as long, raise hang_seconds."
        )

    def keep(self, store: dist.Store) -> None:
        """Look again and again until the run is done."""
        while not self._done.wait(min(5.0, self._limit_s / 4)):
            try:
                message = self.look(store)
            except dist.DistNetworkError:
                message = ""  # the first rank has ended and said why
            except (dist.DistError, RuntimeError) as error:
                message = f"{self._title}: the first rank does not answer any more ({error})."
            if message is not None and not self._done.is_set():
                if message:
                    print(f"error: {message}", file=sys.stderr, flush=True)
                else:  # another rank speaks; give it time before the launcher ends all
                    self._done.wait(self._limit_s / 2 + 5.0)
                os._exit(EXIT_CODE)

    def stop(self) -> None:
        """The run is done."""
        self._done.set()


@contextlib.contextmanager
def watched(limit_s: float, title: str) -> Iterator[Watch | None]:
    """Inside the block a rank that hangs ends the run; None where there is only one."""
    if not dist.is_initialized():
        yield None
        return
    watch = Watch(limit_s, title)
    # A connection of its own: the group's is busy while its owner waits in a collective.
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    thread = threading.Thread(target=watch.keep, args=(store,), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join(timeout=10)

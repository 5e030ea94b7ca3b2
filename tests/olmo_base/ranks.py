"""Several processes of a run, started once and given one piece of work after the other."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from olmo_base.run.errors import Stopped, UserError

PRELOADED = ["olmo_base.pretrain", "torch.distributed.checkpoint", "tests.olmo_base.ranks"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    while True:
        try:
            work, arguments, more = pipe.recv()
        except EOFError:
            return
        os.environ.update(more)
        try:
            pipe.send(work(*arguments))
        except UserError as error:
            pipe.send(error)
        except Stopped as stopped:
            pipe.send(("stopped", stopped.exit_code, stopped.where))


class Ranks:
    """Some processes that each know which rank they are."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.processes, self._pipes = [], []
        for rank in range(number):
            ours, theirs = context.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(number),
                "LOCAL_WORLD_SIZE": str(number),
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            }
            process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def begin(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Every rank does this."""
        port = {"MASTER_PORT": str(free_port())}
        for pipe in self._pipes:
            pipe.send((work, arguments, port))

    def results(self) -> list[Any]:
        """What came of it, by rank; None of a process that has ended."""
        found = []
        for pipe in self._pipes:
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append(None)
        return found

    def do(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Every rank does this; what came of it, by rank."""
        self.begin(work, *arguments)
        return self.results()

    def end(self) -> None:
        """No more work."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join()

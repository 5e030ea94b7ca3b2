"""Errors that are for people: the door prints their message and exits, without a traceback."""

import signal
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message names what was found, what was needed, what to do.

    The doors print it as one message and exit with code 2.
    """


class DataError(UserError):
    """A row or file that cannot be used as it is, named by file and line."""

    def __init__(
        self, path: str | Path, line: int | None, problem: str, next_step: str = ""
    ) -> None:
        place = str(path) if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {problem}" + (f" {next_step}" if next_step else ""))
        self.path = Path(path)
        self.line = line
        self.problem = problem


class Stopped(Exception):
    """A loop ended early because a signal asked it to; its checkpoint is already safe on disk."""

    def __init__(self, signal_number: int, where: str = "") -> None:
        super().__init__(where)
        self.signal_number = signal_number
        self.where = where

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; 0 after a signal by which a scheduler asks for the machine."""
        return 128 + signal.SIGINT if self.signal_number == signal.SIGINT else 0

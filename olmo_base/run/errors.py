"""Errors that are for people: the door prints their message and exits, without a traceback."""

import errno
import os
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


# Errors of the machine, not of the code: the user can make room or change a permission.
MACHINE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
)


def machine_error(error: BaseException) -> str | None:
    """What the disk or a permission refused, in words; None for any other error."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in MACHINE_ERRORS:
            place = f"{chain.filename}: " if chain.filename else ""
            return f"{place}{os.strerror(chain.errno)}."
        # safetensors and torch write through their own code and keep only the system's words
        for number in MACHINE_ERRORS:
            if f"{os.strerror(number)} (os error" in str(chain):
                return f"{os.strerror(number)} while writing a file."
        chain = chain.__cause__ or chain.__context__
    return None

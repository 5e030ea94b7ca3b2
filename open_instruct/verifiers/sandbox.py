"""Model-written programs are run here, where they can do no harm: a process that sees nothing.

No network, no other process, no file but Python's own, no environment, no further processes;
memory, time and file size are limited. Namespaces (our own, or bubblewrap's), resource limits and a
seccomp filter do it together, and where one of them cannot be had nothing is run.
"""

import functools
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from olmo_base.run.errors import UserError

HERE = Path(__file__).parent
NOT_CONFINED = 125  # jail.py's exit code
GREETING = b"jail: here\n"
OUT_OF_TIME = 128 + signal.SIGXCPU
WAYS = ("bubblewrap", "namespaces")
MAX_REPORT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    timeout_s: float = 10.0  # the start of the interpreter included
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20  # of each file, and of all files together


@dataclass(frozen=True)
class Outcome:
    """Whether the tests ran to their end without an error, and if not, why."""

    passed: bool
    problem: str = ""


class NotConfined(UserError):
    """The machine refused a part of the confinement; nothing was run."""


DEFAULT_LIMITS = Limits()


def run_tests(
    answer: str,
    tests: str,
    *,
    names: Iterable[str] = (),
    limits: Limits = DEFAULT_LIMITS,
    way: str | None = None,
) -> Outcome:
    """Run a program and then its tests, in a sandbox of their own.

    ``names`` are what the answer should define: only these may replace a builtin for the tests.
    ``way`` is one of WAYS; None takes the first that works. Errors: UserError if none does.
    """
    return _run(way or check_confinement(), answer, tests, list(names), limits)


@functools.cache
def check_confinement() -> str:
    """How this machine confines programs, one of WAYS. Errors: UserError if in neither."""
    reasons = []
    for way in WAYS:
        if way == "bubblewrap" and shutil.which("bwrap") is None:
            reasons.append("bubblewrap: not installed")
            continue
        try:
            outcome = run_tests("x = 1", "assert x == 1", way=way)
        except NotConfined as error:
            reasons.append(f"{way}: {error}")
            continue
        if outcome.passed:
            return way
        reasons.append(f"{way}: {outcome.problem}")
    raise UserError(
        "Model-written code is run only in a sandbox, and none can be built on this machine "
        f"({'; '.join(reasons)}). Install bubblewrap, or allow unprivileged user namespaces "
        "(Linux 5.12 or newer, x86-64 or ARM)."
    )


# ---------------------------------------------------------------- one run


def _run(way: str, answer: str, tests: str, names: list[str], limits: Limits) -> Outcome:
    token = secrets.token_hex(32)
    given = {"token": token, "answer": answer, "tests": tests, "names": names}
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as root:
        file.write(json.dumps(given).encode())
        file.seek(0)
        process = subprocess.Popen(
            _command(way, root, limits),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            close_fds=True,
            start_new_session=True,
        )
        report, code = _watch(process, time.monotonic() + limits.timeout_s)
    # What stands before the jail's first word no answer can have written.
    has_begun, report = report.startswith(GREETING), report.removeprefix(GREETING)
    words = report[:200].decode(errors="replace").strip()
    if code == NOT_CONFINED or not has_begun:
        raise NotConfined(words.removeprefix("jail: ") or f"no sandbox in {limits.timeout_s:g} s")
    start = report.find(token.encode())
    if start >= 0:
        said, _, problem = report[start + len(token) + 1 :].decode(errors="replace").partition(" ")
        return Outcome(said == "passed", problem)
    if code is None or code == OUT_OF_TIME:
        return Outcome(False, f"not done after {limits.timeout_s:g} s")
    return Outcome(False, "it ended before the tests did" + (f": {words}" if words else ""))


def _watch(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, int | None]:
    """What the process wrote, and its exit code; None if it had to be killed."""
    report = bytearray()
    assert process.stdout is not None
    try:
        with process.stdout as pipe, selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while len(report) < MAX_REPORT_BYTES:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return bytes(report), None
                piece = os.read(pipe.fileno(), MAX_REPORT_BYTES)
                if not piece:
                    break
                report += piece
        try:
            return bytes(report), process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return bytes(report), None
    finally:
        if process.poll() is None:
            # The first process of the sandbox goes with it, and all others with that one.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _command(way: str, root: str, limits: Limits) -> list[str]:
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    readable = _readable(python)
    settings = {
        "python": python,
        "runner": (HERE / "run_tests.py").read_text(encoding="utf-8"),
        "readable": readable,
        "root": None if way == "bubblewrap" else root,
        "parent": os.getpid(),
        "limits": {
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "cpu_s": math.ceil(limits.timeout_s),
        },
    }
    if way == "namespaces":
        return [python, "-I", "-S", str(HERE / "jail.py"), json.dumps(settings)]
    bwrap = shutil.which("bwrap")
    assert bwrap is not None
    shown: list[str] = []
    for path in readable:
        if os.path.islink(path):
            shown += ["--symlink", os.readlink(path), path]
        else:
            shown += ["--dev-bind" if path == "/dev/null" else "--ro-bind", path, path]
    return [
        *(bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
        *("--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", *shown),
        *("--ro-bind", str(HERE / "jail.py"), "/jail.py"),
        *("--perms", "0700", "--size", str(limits.file_bytes), "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp", "--"),
        *(python, "-I", "-S", "/jail.py", json.dumps(settings)),
    ]


def _readable(python: str) -> list[str]:
    """The files that a bare Python needs: itself, its library, and the system's libraries."""
    outside_venv = {"platbase": sys.base_exec_prefix}
    folders = [
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib", vars=outside_venv),
        *(f"{sys.base_prefix}/{name}" for name in ("lib", "lib64")),
        *("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null"),
    ]
    found: list[str] = []
    for path in sorted({os.path.abspath(path) for path in [python, *folders]}):
        if os.path.lexists(path) and not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found

"""The sandbox against programs that try to get out of it, or to be believed without working."""

import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from olmo_base.run.errors import UserError
from open_instruct.verifiers import sandbox
from open_instruct.verifiers.sandbox import (
    WAYS,
    Limits,
    NotConfined,
    Outcome,
    check_confinement,
    run_tests,
)

QUICK = Limits(timeout_s=1.0, memory_bytes=256 << 20, file_bytes=1 << 20)
TESTS = "assert add(2, 3) == 5"
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.fixture(params=WAYS, scope="module")
def way(request) -> str:
    if request.param == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    try:
        run_tests("", "", way=request.param)
    except NotConfined as error:
        pytest.skip(f"this machine cannot confine: {error}")
    return request.param


def after(way: str, attack: str, answer: str = RIGHT) -> Outcome:
    """What the tests find when the attack ran before a right answer."""
    return run_tests(f"{attack}\n{answer}", TESTS, limits=QUICK, way=way)


def blocked(way: str, attack: str) -> str:
    """The error that an attack meets."""
    outcome = run_tests(attack, "", limits=QUICK, way=way)
    assert not outcome.passed, attack
    return outcome.problem


# ---------------------------------------------------------------- what works inside


def test_right_and_wrong_programs_are_told_apart(way):
    assert run_tests(RIGHT, TESTS, way=way) == Outcome(True)
    wrong = run_tests("def add(a, b): return a - b", TESTS, way=way)
    assert (wrong.passed, wrong.problem[:14]) == (False, "AssertionError")
    assert run_tests("def add(:", TESTS, way=way).problem.startswith("SyntaxError")
    assert run_tests("", TESTS, way=way).problem == "NameError: name 'add' is not defined"


def test_ordinary_programs_run(way):
    program = """
import asyncio, collections, dataclasses, functools, hashlib, itertools, json, math, random, re
from typing import List

@dataclasses.dataclass
class Pair:
    a: int
    b: int

async def later(): return 7

def work() -> List[int]:
    with open("/tmp/note.txt", "w") as file: file.write("x")
    assert open("/tmp/note.txt").read() == "x"
    print("said ☕")
    return [Pair(1, 2).b, asyncio.run(later()), math.gcd(4, 6), len(hashlib.sha256(b"").digest())]
"""
    assert run_tests(program, "assert work() == [2, 7, 2, 32]", way=way) == Outcome(True)
    equal = "assert Pair(1, 2) == Pair(1, 2) and collections.Counter('aa') == {'a': 2}"
    assert run_tests(program, equal, way=way) == Outcome(True)


def test_a_name_that_is_asked_for_may_be_that_of_a_builtin(way):
    answer = "def sum(a, b): return a + b"
    assert run_tests(answer, "assert sum(10, 15) == 25", names=["sum"], way=way).passed
    assert not run_tests(answer, "assert sum(10, 15) == 25", way=way).passed


def test_half_a_surrogate_pair_is_a_wrong_answer_and_no_crash(way):
    assert not run_tests("x = '\ud83d'", "assert x == 1", way=way).passed


# ---------------------------------------------------------------- using up the machine


@pytest.mark.parametrize(
    "attack",
    ["while True: pass", "import time; time.sleep(100)", "sum(range(10**12))", "2 ** (10 ** 10)"],
)
def test_what_does_not_end_is_ended(way, attack):
    outcome = after(way, attack)
    assert not outcome.passed
    if "while" in attack or "sleep" in attack:
        assert outcome.problem == "not done after 1 s"


def test_a_memory_bomb_meets_its_limit(way):
    assert blocked(way, "x = bytearray(10**9)").startswith("MemoryError")
    assert "MemoryError" in blocked(way, "x = []\nwhile True: x.append(bytearray(10**7))")


def test_a_fork_bomb_gets_no_process_and_no_thread(way):
    assert "PermissionError" in blocked(way, "import os\nwhile True: os.fork()")
    assert "can't start new thread" in blocked(
        way, "import threading\nwhile True: threading.Thread(target=print).start()"
    )
    assert "PermissionError" in blocked(way, "import subprocess; subprocess.run(['/bin/true'])")


def test_a_disk_cannot_be_filled(way):
    assert "OSError" in blocked(way, "open('/tmp/x', 'wb').write(bytes(2 << 20))")
    many = "for n in range(9): open(f'/tmp/{n}', 'wb').write(bytes(1 << 19))"
    assert "No space left" in blocked(way, many)


def test_printing_without_end_fills_nothing(way):
    assert after(way, "for _ in range(10**5): print('x' * 1000)").passed
    assert not after(way, "while True: print('x' * 10**6)").passed
    # 3 is where the verdict will be written
    assert not after(way, "import os\nwhile True: os.write(3, b'x' * 10**6)").passed


# ---------------------------------------------------------------- reaching outside


def test_no_file_of_the_machine_can_be_read(way, tmp_path):
    (tmp_path / "secret").write_text("x")
    for path in ("/etc/passwd", __file__, str(Path.home() / ".bashrc"), str(tmp_path / "secret")):
        assert "FileNotFoundError" in blocked(way, f"open({path!r}).read()"), path
    for folder in ("/proc", "/sys", "/home", str(Path(__file__).parents[3])):
        assert "FileNotFoundError" in blocked(way, f"import os; os.listdir({folder!r})"), folder
    listed = "import os\nassert not os.listdir('/tmp') and os.listdir('/dev') == ['null']"
    assert run_tests(listed, "", way=way).passed


def test_nothing_can_be_written_outside(way, tmp_path):
    library = os.path.realpath(os.__file__)
    for path in ("/x", "/etc/x", "/usr/lib/x", library, "/dev/x"):
        problem = blocked(way, f"open({path!r}, 'a')")
        assert "Read-only" in problem or "Permission" in problem, (path, problem)
    assert "FileNotFoundError" in blocked(way, f"open({str(tmp_path / 'x')!r}, 'w')")
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_network(way):
    assert "PermissionError" in blocked(way, "import socket; socket.socket()")
    assert "PermissionError" in blocked(
        way, "import urllib.request; urllib.request.urlopen('http://127.0.0.1', timeout=1)"
    ) or "URLError" in blocked(
        way, "import urllib.request; urllib.request.urlopen('http://127.0.0.1', timeout=1)"
    )


def test_no_other_process_can_be_reached(way):
    kill = f"import os\nfor pid in (os.getppid(), 1, {os.getpid()}):\n"
    kill += "    try: os.kill(pid, 9)\n    except OSError: pass\n"
    assert after(way, kill).passed  # nobody died, the tests were run
    assert "ProcessLookupError" in blocked(way, f"import os; os.kill({os.getpid()}, 9)")
    assert not after(way, "import os; os.kill(os.getpid(), 9)").passed


@pytest.mark.parametrize(
    "name",
    ["mount", "umount2", "unshare", "ptrace", "chroot", "setns", "memfd_create", "shmget"],
)
def test_dangerous_system_calls_are_refused(way, name):
    attack = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    attack += f"result = libc.{name}(0, 0, 0, 0, 0)\n"
    tests = "assert result == -1 and ctypes.get_errno() == 1, (result, ctypes.get_errno())"
    assert run_tests(attack, tests, way=way).passed


def test_nothing_is_inherited(way, monkeypatch, tmp_path):
    monkeypatch.setenv("A_SECRET", "x")
    opened = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(opened, True)
    try:
        program = "import os\nnames = set(os.environ)\nopen_files = set()\n"
        program += "for n in range(64):\n    try: os.fstat(n); open_files.add(n)\n"
        program += "    except OSError: pass\n"
        # standard input, output and error, all /dev/null, and where the verdict goes
        tests = "assert names <= {'LC_CTYPE'} and open_files == {0, 1, 2, 3}, (names, open_files)"
        assert run_tests(program, tests, way=way) == Outcome(True)
    finally:
        os.close(opened)


def test_nothing_is_left_behind(way, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_tests("open('/tmp/left', 'w').write('x')", "", way=way)
    run_tests("while True: pass", "", limits=QUICK, way=way)
    assert list(tmp_path.iterdir()) == []


def child_of(pid: int) -> int:
    """The first child of a process, as soon as it has one."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    while not (found := file.read_text().split()):
        os.sched_yield()
    return int(found[0])


def test_a_killed_evaluation_takes_its_sandbox_with_it(way):
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this kernel does not tell a process's children")
    code = "from open_instruct.verifiers.sandbox import Limits, run_tests\n"
    code += "program = 'import time; time.sleep(30)'\n"
    code += f"run_tests(program, '', limits=Limits(timeout_s=30), way={way!r})"
    evaluation = subprocess.Popen([sys.executable, "-c", code])
    try:
        outer = child_of(evaluation.pid)
        inside = [os.pidfd_open(pid) for pid in (outer, child_of(outer))]
    finally:
        evaluation.kill()
        evaluation.wait()
    for descriptor in inside:
        ended, _, _ = select.select([descriptor], [], [], 10)
        os.close(descriptor)
        assert ended


# ---------------------------------------------------------------- being believed without working

WRONG = "def add(a, b):\n    return 0\n"


@pytest.mark.parametrize(
    "attack",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import os; os._exit(0)",
        "print('passed')",
        "def check(candidate): pass",
        "import builtins; builtins.AssertionError = SystemExit",
        "import builtins; builtins.compile = lambda *a: ''",
        "import builtins; builtins.exec = lambda *a: None",
        "import builtins; builtins.abs = lambda x: 0",
        "import json; json.dumps = lambda x: '{}'",
        "import json; real = json.JSONEncoder.encode\n"
        "json.JSONEncoder.encode = lambda self, said: real(self, said | {'problem': None})",
        "import ast; ast.parse = lambda x: 0",
        "import ast; empty = ast.parse(''); ast.parse = lambda x: empty",
        "import __main__; vars(__main__).update(equal=lambda a, b: True)",
        "import math; math.isclose = lambda a, b: True",
        "import os; os.write(3, b'0' * 64 + b' passed '); os._exit(0)",
        "import os; os.write(3, b'jail: no namespaces'); os._exit(125)",
        "import os; os.write(3, b'bwrap: no'); os._exit(1)",
        "import sys; sys.settrace(lambda *a: sys.exit(0))",
        "import atexit, os; atexit.register(os._exit, 0)",
        "import os, signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)",
        "import sys; sys.modules.clear()",
        "class Yes:\n    __eq__ = lambda self, other: True\nWRONG = Yes()",
    ],
)
def test_a_wrong_answer_stays_wrong(way, attack):
    tests = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert abs(-1) == 1\n"
    tests += "    import math\n    assert math.isclose(candidate(2, 3), 5)\ncheck(add)"
    outcome = run_tests(f"{attack}\n{WRONG}", tests, limits=QUICK, way=way)
    assert not outcome.passed


@pytest.mark.parametrize(
    "returned",
    ["Yes()", "[Yes()]", "{1: (Yes(),)}", "Sub(0)", "Odd()"],
)
def test_an_object_that_equals_everything_is_not_an_answer(way, returned):
    answer = "class Yes:\n    def __eq__(self, other): return True\n"
    answer += "    def __hash__(self): return 0\n"
    answer += "import functools\n"
    answer += "class Odd: __eq__ = functools.partial(lambda *given: True)\n"
    answer += "class Sub(int):\n    def __eq__(self, other): return True\n"
    answer += f"def add(a, b): return {returned}"
    for expected in ("5", "[5]", "{1: (5,)}"):
        tests = f"assert add(2, 3) == {expected}"
        assert not run_tests(answer, tests, way=way).passed
    assert "its own ==" in run_tests(answer, "assert add(2, 3) == 5", way=way).problem


def test_builtins_that_the_answer_replaced_are_whole_again_for_the_tests(way):
    answer = "import builtins\nbuiltins.abs = lambda x: 0\nabs = len = lambda x: 0\n"
    answer += "def half(x): return 0.0"
    assert not run_tests(answer, "assert abs(half(3) - 1.5) < 1e-6", way=way).passed


# ---------------------------------------------------------------- no sandbox, no run


def test_nothing_is_run_where_nothing_can_be_confined(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "HERE", tmp_path)  # a machine whose jail fails to build
    (tmp_path / "run_tests.py").write_text("")
    (tmp_path / "jail.py").write_text(
        "print('jail: here\\njail: unshare: not permitted')\nraise SystemExit(125)"
    )
    check_confinement.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(UserError, match=r"not installed; namespaces: unshare: not permitted"):
            run_tests(RIGHT, TESTS)
    finally:
        check_confinement.cache_clear()

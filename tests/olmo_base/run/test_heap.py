"""Memory that was freed stays in the process."""

import platform
import subprocess
import sys

import pytest

from olmo_base.run.heap import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from olmo_base.run.heap import keep_freed_memory

assert sys.argv[1] == "left" or keep_freed_memory()

def faults_of_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(2**20 * size) for size in (1, 2, 5, 12)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min([faults_of_step() for _ in range(8)][4:]))
"""


def faults(*, keeps):
    command = [sys.executable, "-c", FAULTS, "kept" if keeps else "left"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_steps_that_follow_take_no_new_pages_from_the_system():
    num_pages = 20 * 2**20 * 4 // 4096
    assert faults(keeps=False) > num_pages / 2
    assert faults(keeps=True) < num_pages / 20


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()

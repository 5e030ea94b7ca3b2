"""The process of a run: signals that ask, seeds that repeat."""

import os
import signal

import pytest
import torch

from olmo_base.run.errors import Stopped
from olmo_base.run.launch import seed_everything, stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_for_an_end_and_the_handler_is_put_back(number):
    before = signal.getsignal(number)
    with stop_signals() as flag:
        assert not flag.requested
        os.kill(os.getpid(), number)
        assert flag.requested
        assert flag.signal_number == number
    assert signal.getsignal(number) == before


def test_a_scheduler_that_wants_the_machine_gets_exit_code_0_and_ctrl_c_130():
    codes = {number: Stopped(number).exit_code for number in (signal.SIGTERM, signal.SIGUSR1)}
    assert set(codes.values()) == {0}
    assert Stopped(signal.SIGINT).exit_code == 130


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_same_seed_draws_the_same_numbers():
    seed_everything(3)
    first = torch.rand(4)
    seed_everything(3)
    torch.testing.assert_close(torch.rand(4), first)

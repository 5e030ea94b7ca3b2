"""The process of a run: signals that ask, seeds that repeat."""

import os
import signal

import pytest
import torch

from olmo_base.run.launch import seed_everything, stop_signals


def test_a_signal_asks_for_an_end_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as flag:
        assert not flag.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested
        assert flag.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_same_seed_draws_the_same_numbers():
    seed_everything(3)
    first = torch.rand(4)
    seed_everything(3)
    torch.testing.assert_close(torch.rand(4), first)

"""Many clients at once on a server of its own process, by the benchmark's own load."""

import pytest

from benchmarks.serve import (
    VARIANTS,
    Load,
    fairness,
    free_port,
    growth,
    in_own_process,
    mixed_up,
    our_command,
    started,
    write_endless,
)
from tests.open_instruct.chat.running import save_chat_model

CLIENTS = 8


def test_many_streams_are_whole_fair_and_those_given_alone(tmp_path):
    save_chat_model(tmp_path / "model")
    model = write_endless(tmp_path / "model", tmp_path / "endless")
    keys = [(client, turn) for client in range(CLIENTS) for turn in range(VARIANTS)]
    port = free_port()
    with started(our_command(model, port), port) as server:
        many = in_own_process("many", server, str(model), CLIENTS, 2.0)
        alone = in_own_process("alone", server, str(model), keys)
        beside = in_own_process("beside", server, str(model), 3, str(model))
    assert many.errors == alone.errors == beside.errors == []
    assert len(beside.first_s) == len(beside.prefill_s) == 3 and min(beside.prefill_s) > 0
    assert len({text for _, text in alone.texts}) == len(alone.texts) == len(keys)
    assert many.texts and mixed_up(many, alone) == []
    # On a machine so busy that each has only a few tokens, one more says nothing.
    assert fairness(many) >= 1 / 3 or max(many.tokens) < 20
    assert growth(many) < 1.2


def test_a_mixed_up_text_a_starved_client_and_growing_memory_are_seen():
    alone = Load(texts=[((0, 0), "a"), ((1, 0), "b")])
    many = Load(texts=[((0, 0), "a"), ((1, 0), "a")], tokens=[9, 1], resident=[*range(1, 100)])
    assert mixed_up(many, alone) == [(1, 0)]
    assert fairness(many) == pytest.approx(1 / 9)
    assert growth(many) > 3

"""What a step is said to need, and what follows; benchmarks/memory.py measures it."""

import pytest
import torch

from olmo_base.model.packing import Packing
from open_instruct import memory, tuning
from open_instruct.batches import MicroBatchSize, pack
from open_instruct.logprobs import AT_LABELS, EVERYWHERE, HEAD_AT_LABELS, PACKED, native_over
from open_instruct.memory import REWARDS, Sizes, memory_at_hand, training_memory
from tests.open_instruct.tiny import tiny_olmo2

SIZE = MicroBatchSize(step=0, positions=100, seen=100 * 25, longest=25, labels=40)
FLOAT = 4


def needed(way=PACKED, *, recomputes=False, batches=(SIZE,), device="cpu", **changes):
    model = tiny_olmo2()
    number = sum(weight.numel() for weight in model.parameters())
    return training_memory(
        model.config,
        Sizes(number, number),
        list(batches),
        way=way,
        gradient_checkpointing=recomputes,
        device=device,
        **changes,
    )


def test_logits_count_as_often_as_a_way_holds_them():
    many = [replace_size(labels=60_000)]
    logits = FLOAT * 60_000 * tiny_olmo2().config.vocab_size
    once = needed(HEAD_AT_LABELS, batches=many) - needed(REWARDS, batches=many)
    thrice = needed(AT_LABELS, batches=many) - needed(REWARDS, batches=many)
    statistic = needed(HEAD_AT_LABELS, batches=many, needs_distribution=True)
    assert once == pytest.approx(1.05 * logits, rel=0.1)
    assert thrice == pytest.approx(3 * once, rel=0.1)
    assert statistic - needed(REWARDS, batches=many) == pytest.approx(4 * once, rel=0.1)
    long = [replace_size(positions=90_000, labels=60_000)]
    assert needed(EVERYWHERE, batches=long) > needed(AT_LABELS, batches=long)


def replace_size(**changes):
    return SIZE._replace(**changes)


def test_a_native_layer_is_counted_as_autograd_keeps_it():
    def kept(num_layers, length=64, width=64, inner=256):
        model = tiny_olmo2(num_hidden_layers=num_layers, hidden_size=width, intermediate_size=inner)
        native = native_over(model)
        assert native is not None
        ids_RT = torch.randint(256, (4, length), generator=torch.Generator().manual_seed(0))
        packing: Packing = pack(torch.full((4,), length).numpy())
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        held = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            native.packed(ids_RT, packing)
        return sum(size for size, _ in held.values())

    size = MicroBatchSize(step=0, positions=256, seen=4 * 64**2, longest=64, labels=1)

    def counted(num_layers):
        config = tiny_olmo2(
            num_hidden_layers=num_layers, hidden_size=64, intermediate_size=256
        ).config
        return training_memory(
            config, Sizes(0, 0), [size], way=PACKED, gradient_checkpointing=False
        )

    found = (kept(3) - kept(2)) * 1.05
    assert counted(3) - counted(2) == pytest.approx(found, rel=0.05)


def test_recomputation_takes_less_and_more_layers_take_more():
    assert needed(recomputes=True) < needed()
    deep = tiny_olmo2(num_hidden_layers=6).config
    shallow = tiny_olmo2().config
    sizes = Sizes(1000, 1000)

    def of(config):
        return training_memory(config, sizes, [SIZE], way=PACKED, gradient_checkpointing=False)

    assert of(deep) > of(shallow)


def test_a_frozen_model_has_neither_gradients_nor_moments():
    config = tiny_olmo2().config

    def of(trained):
        sizes = Sizes(10**6, trained)
        return training_memory(
            config, sizes, [SIZE], way=HEAD_AT_LABELS, gradient_checkpointing=False
        )

    assert of(10**6) - of(1000) > 2 * FLOAT * 0.99 * 10**6


def test_the_memory_here_is_divided_among_the_ranks_of_the_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = memory_at_hand(torch.device("cpu"))
    assert alone > 2**28
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_at_hand(torch.device("cpu")) == alone // 2


def test_a_container_may_have_less_than_the_machine(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (limit, tmp_path / "absent"))
    limit.write_text("1000\n")
    assert memory_at_hand(torch.device("cpu")) == 1000
    limit.write_text("max\n")
    assert memory_at_hand(torch.device("cpu")) > 2**28


def test_what_fills_the_memory_here_does_not_fit(monkeypatch):
    monkeypatch.setattr(tuning, "memory_at_hand", lambda device: 1000)
    assert tuning.fits(850, torch.device("cpu"))
    assert not tuning.fits(851, torch.device("cpu"))

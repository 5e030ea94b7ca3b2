"""What a process of a pretraining run is said to hold, worked out by hand."""

import pytest

from olmo_base.expected_memory import (
    Division,
    division_of,
    expected_memory_bytes,
    weights_bytes,
)
from olmo_base.model.presets import PRESETS
from olmo_base.model.transformer import num_parameters
from olmo_base.parallel import ParallelConfig
from olmo_base.run.errors import UserError

OLMO2_7B = PRESETS["olmo2_7b"]
ENDS = 2 * OLMO2_7B.vocab_size * OLMO2_7B.hidden_size  # embedding and head
LAYER = (num_parameters(OLMO2_7B) - ENDS) / 32


def test_seven_billion_weights_over_eight_processes():
    whole = weights_bytes(OLMO2_7B, Division(), bf16=False, checkpointing=True)
    assert whole == 16 * num_parameters(OLMO2_7B)  # 116.8 GB: on no GPU
    fsdp = division_of(ParallelConfig(data_parallel="fsdp"), 8)
    assert (fsdp.weight_parts, fsdp.num_data) == (8, 8)
    each = weights_bytes(OLMO2_7B, fsdp, bf16=False, checkpointing=True)
    # An eighth; two layers and the ends gathered, a layer's and the ends' gradients.
    assert each == pytest.approx(whole / 8 + 4 * (2 * LAYER + ENDS + LAYER + ENDS))
    assert 23.6e9 < each < 23.7e9


def test_bf16_is_a_copy_of_whole_weights_and_what_divided_ones_are_gathered_in():
    fsdp = division_of(ParallelConfig(data_parallel="fsdp"), 8)
    copied = {False: num_parameters(OLMO2_7B), True: ENDS + 2 * LAYER}
    for checkpointing, number in copied.items():
        plain, bf16, plain_part, bf16_part = (
            weights_bytes(OLMO2_7B, division, bf16=precision, checkpointing=checkpointing)
            for division in (Division(), fsdp)
            for precision in (False, True)
        )
        assert bf16 - plain == pytest.approx(2 * number)
        # Two layers gathered in half the bytes, and a copy of the head.
        assert bf16_part - plain_part == pytest.approx(2 * ENDS / 2 - 2 * 2 * LAYER)


def test_whole_copies_are_whole_on_every_process_and_hybrid_ones_on_every_machine():
    ddp = division_of(ParallelConfig(), 8)
    assert (ddp.weight_parts, ddp.num_data) == (1, 8)
    hybrid = division_of(ParallelConfig(data_parallel="hsdp"), 32)
    assert (hybrid.copies, hybrid.weight_parts, hybrid.num_data) == (4, 8, 32)
    alone = weights_bytes(OLMO2_7B, Division(), bf16=True, checkpointing=True)
    assert weights_bytes(OLMO2_7B, ddp, bf16=True, checkpointing=True) == alone
    sharded = division_of(ParallelConfig(data_parallel="fsdp"), 8)
    assert weights_bytes(OLMO2_7B, hybrid, bf16=True, checkpointing=True) == weights_bytes(
        OLMO2_7B, sharded, bf16=True, checkpointing=True
    )


def test_parts_of_a_layer_divide_its_weights_and_parts_of_a_row_its_activations():
    tensor = division_of(ParallelConfig(data_parallel="fsdp", tensor_parallel=8), 8)
    assert (tensor.num_data, tensor.weight_parts, tensor.tensor) == (1, 1, 8)
    each = weights_bytes(OLMO2_7B, tensor, bf16=False, checkpointing=True)
    assert each == pytest.approx(16 * (ENDS + 32 * LAYER / 8))

    def activations(division):
        whole = expected_memory_bytes(
            OLMO2_7B, 1, 4096, bf16=True, checkpointing=False, device="cuda", division=division
        )
        return whole - weights_bytes(OLMO2_7B, division, bf16=True, checkpointing=False)

    context = division_of(ParallelConfig(data_parallel="fsdp", context_parallel=4), 4)
    assert (context.num_data, context.weight_parts) == (1, 4)
    program = 320_000_000
    logits = 3 * 4 * min(2**28, 4096 * OLMO2_7B.vocab_size)
    a_quarter = 3 * 4 * min(2**28, 1024 * OLMO2_7B.vocab_size)
    assert activations(context) - program - a_quarter == pytest.approx(
        (activations(Division()) - program - logits) / 4
    )


def test_what_cannot_be_divided_so_is_refused():
    with pytest.raises(UserError, match="does not divide the 6 ranks"):
        division_of(ParallelConfig(data_parallel="fsdp", tensor_parallel=4), 6)

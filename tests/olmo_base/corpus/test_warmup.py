"""Steps that begin small: sizes and lengths worked out by hand, and sums that agree."""

import pytest
import torch

from olmo_base.corpus.batches import Batch
from olmo_base.corpus.warmup import StepSizes, WarmupConfig


def test_batches_grow_evenly_and_stay():
    sizes = StepSizes(whole=10, start=2, num_warmup=4)
    assert [sizes.at(step) for step in range(7)] == [2, 4, 6, 8, 10, 10, 10]


@pytest.mark.parametrize("sizes", [StepSizes(7), StepSizes(9, 1, 5), StepSizes(5, 5, 3)])
def test_what_stands_before_a_step_is_the_sum_of_the_steps_before_it(sizes):
    sums = [sum(sizes.at(step) for step in range(end)) for end in range(12)]
    assert [sizes.before(end) for end in range(12)] == sums
    for number in range(1, sums[-1]):
        within, needed = sizes.steps_within(number), sizes.steps_for(number)
        assert sums[within] <= number < sums[within + 1]
        assert sums[needed - 1] < number <= sums[needed]


def test_rows_double_at_equal_distances():
    warmup = WarmupConfig(length_warmup_steps=6, length_warmup_start=4)
    assert [warmup.length_at(step, 16) for step in range(8)] == [4, 4, 8, 8, 16, 16, 16, 16]


def test_a_cut_batch_has_the_same_tokens_and_labels():
    ids_BT = torch.arange(16).view(2, 8)
    cut = Batch(ids_BT, ids_BT + 1, ids_BT // 3).cut(4)
    assert cut.ids_BT.shape == (4, 4)
    assert torch.equal(cut.ids_BT.flatten(), ids_BT.flatten())
    assert torch.equal(cut.labels_BT, cut.ids_BT + 1)
    assert cut.document_ids_BT is not None and torch.equal(cut.document_ids_BT, cut.ids_BT // 3)
    assert cut.num_labels == 16

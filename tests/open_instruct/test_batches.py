import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from open_instruct.batches import (
    Examples,
    Steps,
    cut_by_length,
    epoch_order,
    evaluation_batches,
    pack,
)


class Row(NamedTuple):
    ids: list[int]
    is_learnt: list[bool]


def examples_of_lengths(lengths, width=1):
    """Examples whose ids are all different; the second half of each row is learnt."""
    counter = itertools.count(1)
    return Examples(
        [
            [
                Row(
                    [next(counter) for _ in range(length + side)],
                    [place >= length // 2 for place in range(length + side)],
                )
                for side in range(width)
            ]
            for length in lengths
        ]
    )


def steps_over(examples, **changes):
    settings: dict[str, Any] = dict(
        terms_per_example=examples.num_labels_NW.sum(axis=1),
        examples_per_step=8,
        max_micro_batch=8,
        num_ranks=1,
        num_epochs=1.0,
        max_steps=-1,
        seed=0,
        cost_of_cut=0.0,
    )
    return Steps(examples, **(settings | changes))


def test_a_batch_is_padded_on_the_right_and_labels_follow_their_position():
    rows = [Row([5, 6, 7], [False, True, True]), Row([8, 9, 10, 11], [True, False, False, True])]
    batch = Examples([[row] for row in rows]).batch([1, 0], pad_id=99)
    assert batch.ids_RT.tolist() == [[8, 9, 10, 11], [5, 6, 7, 99]]
    assert batch.lengths_R.tolist() == [4, 3]
    # 11 is predicted at position 2 of row 0, 6 and 7 at positions 0 and 1 of row 1; the first id
    # of a row has nothing before it, so 8 is no label.
    assert batch.label_positions_L.tolist() == [2, 4, 5]
    assert batch.label_ids_L.tolist() == [11, 6, 7]
    assert batch.label_sequences_L.tolist() == [0, 1, 1]
    assert batch.examples.tolist() == [1, 0]


def test_sums_over_sequences_keep_those_without_labels():
    rows = [
        Row([1, 2], [False, True]),
        Row([3, 4], [False, False]),
        Row([5, 6, 7], [False] + [True] * 2),
    ]
    batch = Examples([[row] for row in rows]).batch([0, 1, 2])
    sums_R = batch.sums_over_sequences(torch.tensor([-1.0, -2.0, -4.0]))
    assert sums_R.tolist() == [-1.0, 0.0, -6.0]


def test_the_answers_of_a_pair_are_neighbours():
    pairs = [
        (Row([1, 2], [False, True]), Row([1, 3, 4], [False, True, True])),
        (Row([5, 6], [False, True]), Row([5, 7], [False, True])),
    ]
    batch = Examples(pairs).batch([1, 0])
    assert batch.ids_RT[:, :2].tolist() == [[5, 6], [5, 7], [1, 2], [1, 3]]
    assert batch.sums_over_sequences(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])).view(
        -1, 2
    ).tolist() == [
        [-1.0, -2.0],
        [-3.0, -9.0],
    ]


def a_pair_with_a_shared_prompt():
    """Prompt 5 6 7; the answers are 8 9 and 8 1 2, so that their first ids are alike, too."""
    return [
        Row([5, 6, 7, 8, 9], [False, True, False, True, True]),
        Row([5, 6, 7, 8, 1, 2], [False, False, False, True, True, True]),
    ]


def test_a_pair_in_one_row_has_its_common_beginning_once():
    other = [Row([3, 4], [False, True]), Row([3, 4, 2], [False, False, True])]
    examples = Examples([a_pair_with_a_shared_prompt(), other]).sharing_prompts()
    batch = examples.batch([0, 1], pad_id=99)
    assert batch.ids_RT.tolist() == [[5, 6, 7, 8, 9, 1, 2], [3, 4, 2, 99, 99, 99, 99]]
    assert batch.lengths_R.tolist() == [7, 3] == examples.positions_N.tolist()
    # 6 (column 0), 8 (2), 9 (3) of the chosen answer; 8 (2), 1 (3), 2 (5) of the rejected one.
    assert batch.label_positions_L.tolist() == [0, 2, 3, 2, 3, 5, 7, 8]
    assert batch.label_ids_L.tolist() == [6, 8, 9, 8, 1, 2, 4, 2]
    assert batch.label_sequences_L.tolist() == [0, 0, 0, 1, 1, 1, 2, 3]
    positions_RT = batch.position_ids()
    assert positions_RT is not None
    assert positions_RT.tolist() == [[0, 1, 2, 3, 4, 4, 5], [0, 1, 2, 0, 0, 0, 0]]


def test_neither_answer_of_a_shared_row_sees_the_other():
    batch = Examples([a_pair_with_a_shared_prompt()]).sharing_prompts().batch([0])
    may_attend_RTT = batch.may_attend()
    assert may_attend_RTT is not None
    assert may_attend_RTT[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],  # 9, the end of the chosen answer
        [1, 1, 1, 1, 0, 1, 0],  # 1 2, that of the rejected one
        [1, 1, 1, 1, 0, 1, 1],
    ]


def test_pairs_without_a_common_beginning_share_a_row_all_the_same():
    pair = [Row([1, 2], [False, True]), Row([3, 4, 5], [False, True, True])]
    batch = Examples([pair]).sharing_prompts().batch([0])
    assert batch.ids_RT.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.label_positions_L.tolist() == [0, 2, 3]
    positions_RT, may_attend_RTT = batch.position_ids(), batch.may_attend()
    assert positions_RT is not None and may_attend_RTT is not None
    assert positions_RT.tolist() == [[0, 1, 0, 1, 2]]
    assert not may_attend_RTT[0, 2:, :2].any()


def test_shared_rows_are_cut_by_what_the_model_reads_and_counted_by_what_is_in_the_data():
    examples = examples_of_lengths([10, 3], width=2)
    shared = examples.sharing_prompts()  # nothing in common
    assert shared.positions_N.tolist() == [21, 7]
    assert shared.num_tokens == examples.num_tokens == 28
    steps = steps_over(shared, terms_per_example=np.ones(2))
    assert steps.num_tokens(0) == 28
    assert max(size.positions for size in steps.micro_batch_sizes(1)) == 21
    uncut = steps_over(shared, cost_of_cut=1e9)
    assert [size[:4] for size in uncut.micro_batch_sizes(1)] == [(0, 42, 2 * 21**2, 21)]
    packed = uncut.micro_batch_sizes(1, packs=True)
    assert [size[:4] for size in packed] == [(0, 28, 21**2 + 7**2, 21)]
    assert sorted(len(batch.ids_RT) for batch in steps.micro_batches(0, 0)) == [1, 1]
    apart = steps_over(examples, terms_per_example=np.ones(2), cost_of_cut=1e9)
    assert [size.positions for size in apart.micro_batch_sizes(1)] == [4 * 11]
    assert [size.positions for size in apart.micro_batch_sizes(1, packs=True)] == [28]
    empty = shared.batch([])
    assert (empty.ids_RT.shape, empty.num_sequences) == ((1, 1), 0)


def test_a_batch_without_examples_has_one_padded_position_and_no_row():
    batch = examples_of_lengths([3, 4], width=2).batch([], pad_id=7)
    assert batch.ids_RT.tolist() == [[7]]
    assert batch.sums_over_sequences(torch.zeros(0)).shape == (0,)


def test_an_epoch_order_is_a_permutation_that_seed_and_epoch_decide():
    order = epoch_order(100, seed=3, epoch=2)
    assert sorted(order) == list(range(100))
    assert (order == epoch_order(100, seed=3, epoch=2)).all()
    assert (order != epoch_order(100, seed=3, epoch=1)).any()
    assert (order != epoch_order(100, seed=4, epoch=2)).any()


def test_every_epoch_sees_every_example_once_and_only_the_last_step_is_smaller():
    steps = steps_over(examples_of_lengths([4] * 20), num_epochs=2.0)
    sizes = [len(steps.numbers(step)) for step in range(steps.total)]
    assert sizes == [8, 8, 8, 8, 8]
    seen = np.concatenate([steps.numbers(step) for step in range(steps.total)])
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert steps.epoch(steps.total) == 2.0
    half = steps_over(examples_of_lengths([4] * 20), num_epochs=0.5)
    assert [len(half.numbers(step)) for step in range(half.total)] == [8, 2]


def test_max_steps_replaces_the_number_of_epochs():
    steps = steps_over(examples_of_lengths([4] * 20), max_steps=7)
    assert steps.total == 7
    assert all(len(steps.numbers(step)) == 8 for step in range(7))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_micro_batch", [1, 3, 8])
def test_a_step_is_dealt_out_completely_and_without_repetition(num_ranks, max_micro_batch):
    lengths = np.random.default_rng(0).integers(2, 40, size=21)
    examples = examples_of_lengths(lengths.tolist())
    steps = steps_over(
        examples, num_ranks=num_ranks, max_micro_batch=max_micro_batch, cost_of_cut=16.0
    )
    for step in range(steps.total):
        shares = [steps.micro_batches(step, rank) for rank in range(num_ranks)]
        assert len({len(share) for share in shares}) == 1, "ranks wait for each other"
        batches = [batch for share in shares for batch in share]
        assert all(batch.num_sequences <= max_micro_batch for batch in batches)
        dealt = sorted(n for batch in batches for n in batch.examples.tolist())
        assert dealt == sorted(steps.numbers(step).tolist())
        assert sum(len(batch.label_ids_L) for batch in batches) == steps.num_terms(step)
        tokens = sum(int(batch.lengths_R.sum()) for batch in batches if batch.num_sequences)
        assert tokens == steps.num_tokens(step)


def test_equal_lengths_are_not_cut_and_very_different_ones_are():
    assert cut_by_length(np.full(6, 10), max_examples=8, cost_of_cut=64.0) == [list(range(6))]
    assert cut_by_length(np.array([10, 10, 10, 500]), 8, 64.0) == [[0, 1, 2], [3]]
    assert cut_by_length(np.array([10, 10, 10, 500]), 8, 1e9) == [[0, 1, 2, 3]]
    assert cut_by_length(np.full(5, 10), max_examples=2, cost_of_cut=64.0) == [[0], [1, 2], [3, 4]]


def test_the_cut_is_the_cheapest_of_all_cuts():
    random = np.random.default_rng(5)

    def cost(groups, lengths):
        return sum(lengths[group[-1]] * len(group) + 20.0 for group in groups)

    for _ in range(20):
        lengths = np.sort(random.integers(1, 60, size=8))
        every_cut = []
        for is_end in itertools.product([False, True], repeat=7):
            ends = [place + 1 for place, end in enumerate(is_end) if end] + [8]
            starts = [0, *ends[:-1]]
            every_cut.append([list(range(a, b)) for a, b in zip(starts, ends, strict=True)])
        allowed = [groups for groups in every_cut if max(map(len, groups)) <= 3]
        cheapest = min(cost(groups, lengths) for groups in allowed)
        found = cut_by_length(lengths, max_examples=3, cost_of_cut=20.0)
        assert [n for group in found for n in group] == list(range(8))
        assert cost(found, lengths) == cheapest


def test_evaluation_sees_every_example_once_over_all_ranks():
    examples = examples_of_lengths([5, 3, 9, 2, 7], width=2)
    shares = [
        evaluation_batches(examples, max_examples=2, num_ranks=2, rank=rank) for rank in (0, 1)
    ]
    seen = sorted(n for share in shares for batch in share for n in batch.examples.tolist())
    assert seen == [0, 1, 2, 3, 4]


def test_rows_end_to_end_lose_no_token_and_repeat_none():
    random = np.random.default_rng(3)
    for number in (1, 2, 7, 40):
        lengths = random.integers(1, 200, size=number)
        packing = pack(lengths)
        columns_RT = np.arange(lengths.max())[None, :] < lengths[:, None]
        assert sorted(packing.sources_N.tolist()) == np.flatnonzero(columns_RT).tolist()
        assert sum(group.num_rows for group in packing.groups) == number
        ends = [group.end for group in packing.groups]
        assert [group.start for group in packing.groups] == [0, *ends[:-1]]
        assert ends[-1] == lengths.sum()


def test_labels_are_found_in_rows_end_to_end():
    examples = examples_of_lengths([30, 4, 200, 5, 5])
    batch = examples.batch([2, 0, 4, 1, 3])
    assert batch.packing is not None
    ids_N = batch.ids_RT.flatten()[batch.packing.sources_N]
    positions_L = batch.packed_positions()
    # All ids differ and count up within a row, so a label is its predecessor and one.
    assert (ids_N[positions_L] + 1).tolist() == batch.label_ids_L.tolist()

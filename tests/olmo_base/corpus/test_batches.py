"""Batches: each token asked for once an epoch, in an order that only seed and step decide."""

import numpy as np
import pytest
import torch

from olmo_base.corpus.batches import (
    Mixture,
    TokenSequences,
    micro_batches,
    ngram_repeats,
    read_split,
    sequences_at,
    shares_of,
    shuffled,
)
from olmo_base.corpus.shards import Place, ShardWriter, read_shards
from olmo_base.run.errors import UserError


def write_shards(folder, documents, *, tokens_per_shard=10**9, tokenizer_sha256="a", vocab=100_000):
    """Shards of documents given as lists of ids; the end token is 0."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(
        folder,
        vocab_size=vocab,
        eos_token_id=0,
        tokenizer_sha256=tokenizer_sha256,
        tokens_per_shard=tokens_per_shard,
    )
    for number, ids in enumerate(documents, start=1):
        place = Place(f"{folder.name}.jsonl", number)
        writer.add(
            np.array([*ids, 0]), np.array([len(ids) + 1]), places=[place], num_bytes=len(ids)
        )
    writer.close()
    return read_shards(folder)


def test_a_sequence_knows_the_documents_its_tokens_belong_to(tmp_path):
    # ids with ends: 1 2 0 | 3 0 | 4 5 6 7 0 || 8 0 | 9 0; the second shard begins after "||"
    shards = write_shards(tmp_path / "a", [[1, 2], [3], [4, 5, 6, 7], [8], [9]], tokens_per_shard=9)
    assert len(shards) == 2
    sequences = TokenSequences(shards, 3)
    found = [[place.line for place in sequences.places(index)] for index in range(len(sequences))]
    # each reads three tokens, and the one after them is asked for
    assert found == [[1, 2], [2, 3], [3], [3, 4, 5]]
    assert str(sequences.places(3)[1]) == "a.jsonl, line 4"
    assert str(Place("book.txt", None)) == "book.txt"


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4097])
def test_a_shuffle_visits_every_place_once(length):
    places = np.arange(length)
    orders = [
        shuffled(places, length, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)
    ]
    for order in orders:
        assert sorted(order) == list(range(length))
    if length >= 16:
        assert len({tuple(order) for order in orders}) == 4


def test_a_shuffle_looks_like_chance():
    length, num_orders = 50, 2000
    orders = np.stack(
        [shuffled(np.arange(length), length, seed=seed, epoch=0) for seed in range(num_orders)]
    )
    # how often place p holds number n: 40 expected, standard deviation 6.3
    counts = np.stack([np.bincount(orders[:, place], minlength=length) for place in range(length)])
    chi_squared = ((counts - num_orders / length) ** 2 / (num_orders / length)).sum()
    assert abs(chi_squared - 49 * 49) < 5 * np.sqrt(2 * 49 * 49)
    neighbours = np.abs(np.diff(orders, axis=1)) == 1
    assert neighbours.mean() == pytest.approx(2 / length, rel=0.05)


def test_the_order_is_pinned():
    # worked out once; a change here would change every run that is resumed
    assert shuffled(np.arange(10), 10, seed=42, epoch=0).tolist() == [3, 9, 0, 2, 1, 8, 6, 5, 4, 7]


def test_an_epoch_has_every_sequence_once_and_steps_run_across_epochs():
    def step(number):
        return sequences_at(range(4 * number, 4 * number + 4), num_sequences=10, seed=3)

    row = np.concatenate([step(number) for number in range(5)])
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10))
    assert row[:10].tolist() != row[10:].tolist()
    assert step(2).tolist() == row[8:12].tolist()


def test_every_token_but_the_first_is_asked_for_once(tmp_path):
    documents = [list(range(1 + 10 * n, 8 + 10 * n + n % 3)) for n in range(20)]
    shards = write_shards(tmp_path, documents, tokens_per_shard=30)
    assert len(shards) > 3  # sequences run across shards
    sequences = TokenSequences(shards, 5)
    row = np.concatenate([[*ids, 0] for ids in documents])
    batch = sequences.batch(range(len(sequences)), mask=False)
    num_used = len(sequences) * 5
    assert len(row) - 1 - num_used < 5
    assert batch.ids_BT.flatten().tolist() == row[:num_used].tolist()
    assert batch.labels_BT.flatten().tolist() == row[1 : num_used + 1].tolist()
    assert batch.num_labels == num_used
    assert sequences.num_documents == 20
    assert sequences.num_bytes == sum(map(len, documents))


def test_document_ids_change_after_the_end_token(tmp_path):
    sequences = TokenSequences(write_shards(tmp_path, [[5, 6], [7], [8, 9, 9]]), 8)
    batch = sequences.batch([0], mask=True)
    assert batch.ids_BT.tolist() == [[5, 6, 0, 7, 0, 8, 9, 9]]
    assert batch.document_ids_BT is not None
    assert batch.document_ids_BT.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]


def test_cutting_a_step_differently_gives_the_same_sequences(tmp_path):
    sequences = TokenSequences(write_shards(tmp_path, [list(range(1, 300))]), 7)

    def tokens_of(size, accumulation):
        batches = micro_batches(
            sequences,
            range(60, 60 + size * accumulation),
            micro_batch_size=size,
            seed=1,
            mask=False,
        )
        assert len(batches) == accumulation
        return torch.cat([batch.ids_BT for batch in batches])

    whole = tokens_of(12, 1)
    for size, accumulation in ((6, 2), (4, 3), (3, 4), (2, 6), (1, 12)):
        assert torch.equal(tokens_of(size, accumulation), whole)


# ---------------------------------------------------------------- repeated n-grams


def slow_ngram_repeats(row):
    most = 1
    for period in range(1, 14):
        for start in range(len(row)):
            count = 1
            first = row[start : start + period]
            while (
                len(first) == period
                and row[start + count * period : start + (count + 1) * period] == first
            ):
                count += 1
            most = max(most, count)
    return most


def test_repeats_are_those_counted_one_by_one():
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 2, (200, 30))
    rows[:50] = generator.integers(0, 9, (50, 30))
    rows[7, 4:30] = np.tile([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], 2)
    assert ngram_repeats(rows).tolist() == [slow_ngram_repeats(row) for row in rows.tolist()]
    assert ngram_repeats(rows)[7] >= 2


def test_sequences_of_repeated_ngrams_are_left_out_of_a_step(tmp_path):
    documents = [[5] * 7, [1, 2, 3, 4, 5, 6, 7], [3, 4, 3, 4, 3, 4, 3]]
    sequences = TokenSequences(write_shards(tmp_path, [*documents, [1]]), 8)

    def rows(limit, size=3):
        batches = micro_batches(
            sequences,
            range(3 // size * size),
            micro_batch_size=size,
            seed=0,
            mask=True,
            max_ngram_repeats=limit,
        )
        assert all(
            batch.document_ids_BT is not None and len(batch.document_ids_BT) == len(batch.ids_BT)
            for batch in batches
        )
        return sorted(row[:7] for batch in batches for row in batch.ids_BT.tolist()), len(batches)

    assert rows(0) == (sorted(documents), 1)
    assert rows(8)[0] == sorted(documents)
    assert rows(4)[0] == sorted(documents[1:])
    assert rows(3)[0] == [documents[1]]
    assert rows(3, size=1) == ([documents[1]], 1)  # no empty batches


# ---------------------------------------------------------------- mixtures


def mixture_of(tmp_path, lengths, ratios, total, max_repeats=9.0):
    """Sources of so many sequences of two tokens, all tokens of source n being n + 1."""
    sources = []
    for number, length in enumerate(lengths):
        shards = write_shards(tmp_path / f"source{number}", [[number + 1] * (2 * length)])
        sources.append(TokenSequences(shards, 2))
    names = [f"source{number}" for number in range(len(lengths))]
    available = [len(source) for source in sources]
    assert available == list(lengths)
    shares = shares_of(names, available, ratios, [max_repeats] * len(lengths), total)
    return Mixture(sources, shares)


def test_a_mixture_reads_each_source_as_often_as_its_ratio_says(tmp_path):
    mixture = mixture_of(tmp_path, [7, 20, 30], [3, 5, 2], total=40)
    assert [share.used for share in mixture.shares] == [12, 20, 8]
    steps = [mixture.at(range(8 * step, 8 * step + 8), seed=1) for step in range(5)]
    row = np.concatenate(steps)
    counts = np.bincount(row, minlength=57)
    assert counts[:7].sum() == 12 and set(counts[:7]) == {1, 2}  # read over again, evenly
    assert (counts[7:27] == 1).all()
    assert counts[27:].sum() == 8 and counts[27:].max() == 1
    kinds = np.digitize(row, [7, 27])
    assert len(set(kinds[:8])) > 1  # mixed, and not one after the other
    other_seed = np.concatenate(
        [mixture.at(range(8 * step, 8 * step + 8), seed=2) for step in range(5)]
    )
    assert other_seed.tolist() != row.tolist()
    # the order does not depend on how it is cut into steps
    assert mixture.at(range(20, 40), seed=1).tolist() == row[20:].tolist()


def test_a_mixture_s_batches_hold_the_tokens_of_their_sources(tmp_path):
    mixture = mixture_of(tmp_path, [7, 20], [1, 1], total=8)
    batch = mixture.batch([0, 6, 7, 26], mask=True)
    assert batch.ids_BT[:, 0].tolist() == [1, 1, 2, 2]
    assert batch.document_ids_BT is not None and batch.document_ids_BT.shape == (4, 2)
    assert [mixture.places(index)[0].path for index in (6, 7)] == ["source0.jsonl", "source1.jsonl"]
    assert len(mixture) == 27 and mixture.num_documents == 2


def test_ratios_are_met_to_the_nearest_sequence():
    shares = shares_of(["a", "b", "c"], [100] * 3, [1, 1, 1], [1.0] * 3, total=100)
    assert sorted(share.used for share in shares) == [33, 33, 34]
    assert sum(share.ratio for share in shares) == pytest.approx(1.0)


def test_a_ratio_that_cannot_be_met_says_how_often_it_would_repeat():
    with pytest.raises(UserError, match=r"b: .* asks for 30 sequences and 20 are there: .* 1\.50"):
        shares_of(["a", "b"], [100, 20], [2, 1], [1.0, 1.0], total=90)
    assert shares_of(["a", "b"], [100, 20], [2, 1], [1.0, 1.5], total=90)[1].repeats == 1.5
    with pytest.raises(UserError, match="less than one of 90 sequences"):
        shares_of(["a", "b"], [100, 20], [1000, 1], [1.0, 1.0], total=90)


def test_large_ids_survive(tmp_path):
    (shard,) = write_shards(tmp_path, [[65_536, 99_999]])
    assert TokenSequences([shard], 2).batch([0], mask=False).labels_BT.tolist() == [[99_999, 0]]


def test_shards_of_two_tokenizers_are_not_mixed(tmp_path):
    first = write_shards(tmp_path / "a", [[1, 2]])
    second = write_shards(tmp_path / "b", [[1, 2]], tokenizer_sha256="b")
    with pytest.raises(UserError, match="different tokenizers"):
        TokenSequences([*first, *second], 2)


def test_too_little_text_for_one_sequence_is_said(tmp_path):
    shards = write_shards(tmp_path, [[1, 2, 3]])
    TokenSequences(shards, 3)
    with pytest.raises(UserError, match="holds 4 tokens; one sequence of max_length 4 needs 5"):
        TokenSequences(shards, 4)


def test_changed_content_is_found_when_asked_to_verify(tmp_path):
    shards = write_shards(tmp_path, [[1, 2, 3]])
    content = shards[0].path.read_bytes()
    shards[0].path.write_bytes(b"\x07" + content[1:])
    with pytest.raises(UserError, match="SHA-256 differs"):
        TokenSequences(shards, 2, verify=True)


def test_splits_of_several_runs_are_read_in_order(tmp_path):
    write_shards(tmp_path / "a" / "tokens" / "train", [[1]])
    write_shards(tmp_path / "b" / "tokens" / "train", [[2]])
    (tmp_path / "a" / "tokens" / "eval").mkdir()
    write_shards(tmp_path / "b" / "tokens" / "eval", [[3]])
    folders = [tmp_path / "a", tmp_path / "b"]
    assert [shard.tokens()[0] for shard in read_split(folders, "train")] == [1, 2]
    assert [shard.tokens()[0] for shard in read_split(folders, "eval")] == [3]
    with pytest.raises(UserError, match="holds no token shards"):
        read_split([tmp_path / "c"], "train")

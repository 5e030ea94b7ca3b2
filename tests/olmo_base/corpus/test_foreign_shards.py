"""Shards of other tools give the same batches as ours, and say where they cannot be right."""

import gzip
import struct

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from olmo_base.corpus.batches import TokenSequences
from olmo_base.corpus.foreign_shards import foreign_files, read_foreign_shards
from olmo_base.corpus.shards import Place, ShardWriter, read_shards
from olmo_base.run.artefact import sha256_file
from olmo_base.run.errors import UserError

EOS = 3
VOCAB_SIZE = 300
GENERATOR = np.random.default_rng(0)
DOCUMENTS = [[*GENERATOR.integers(4, VOCAB_SIZE, size).tolist(), EOS] for size in range(1, 40)]
ENDS = np.cumsum([len(document) for document in DOCUMENTS])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer.json of VOCAB_SIZE ids, of which EOS is <|endoftext|>."""
    names = {id_: f"t{id_}" for id_ in range(VOCAB_SIZE)} | {EOS: "<|endoftext|>"}
    path = tmp_path_factory.mktemp("tokenizer") / "small.json"
    path.write_text(Tokenizer(models.BPE({name: id_ for id_, name in names.items()}, [])).to_str())
    return path


def write_dolma(folder, *, dtype="<u2", documents=DOCUMENTS, described=True):
    ids = np.concatenate([np.array(document) for document in documents])
    ids.astype(dtype).tofile(folder / "part-0.npy")
    if described:
        rows, start = [], 0
        for number, document in enumerate(documents, start=1):
            rows.append(f'{start},{start + len(document)},"id, {number}",a.jsonl.gz,{number}\n')
            start += len(document)
        (folder / "part-0.csv.gz").write_bytes(gzip.compress("".join(rows).encode()))
    return folder / "part-0.npy"


def write_datatrove(folder, *, token_size=2):
    """As datatrove's TokenizedFile does."""
    path = folder / "00000_tokens.ds"
    letter = "I" if token_size == 4 else "H"
    ids = [id_ for document in DOCUMENTS for id_ in document]
    path.write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ENDS)}Q", *ENDS))
    path.with_name(path.name + ".metadata").write_text(f"a/b|{token_size}\n{len(ids)}\n796 T")
    return path


def written_by_us(folder, tokenizer):
    folder.mkdir()
    writer = ShardWriter(
        folder,
        vocab_size=VOCAB_SIZE,
        eos_token_id=EOS,
        tokenizer_sha256=sha256_file(tokenizer),
        tokens_per_shard=10**9,
    )
    for number, document in enumerate(DOCUMENTS, start=1):
        place = Place("a.jsonl.gz", number)
        writer.add(np.array(document), np.array([len(document)]), places=[place], num_bytes=1)
    writer.close()
    return read_shards(folder)


@pytest.mark.parametrize(
    ("write", "keys"),
    [
        (write_dolma, {}),
        (write_dolma, {"dtype": "<u4"}),
        (write_dolma, {"described": False}),
        (write_datatrove, {}),
        (write_datatrove, {"token_size": 4}),
    ],
)
def test_foreign_shards_give_the_same_batches_and_documents_as_ours(
    tmp_path, tokenizer, write, keys
):
    path = write(tmp_path, **keys)
    dtype = "uint32" if keys.get("dtype") == "<u4" else None
    shards = read_foreign_shards(tmp_path, tokenizer_name_or_path=tokenizer, dtype=dtype)
    theirs = TokenSequences(shards, 16, verify=True)
    ours = TokenSequences(written_by_us(tmp_path / "ours", tokenizer), 16, verify=True)
    assert len(theirs) == len(ours) == (ENDS[-1] - 1) // 16
    assert (theirs.num_documents, theirs.eos_token_id) == (len(DOCUMENTS), EOS)
    step = theirs.at(range(10, 15), seed=1)
    batches = [sequences.batch(step, mask=True) for sequences in (theirs, ours)]
    assert torch.equal(batches[0].ids_BT, batches[1].ids_BT)
    assert torch.equal(batches[0].labels_BT, batches[1].labels_BT)
    assert batches[0].document_ids_BT is not None and batches[1].document_ids_BT is not None
    assert torch.equal(batches[0].document_ids_BT, batches[1].document_ids_BT)
    for index in range(len(ours)):
        expected = ours.places(index)
        if write is write_datatrove:
            expected = [Place(f"{path}, document {place.line}", None) for place in expected]
        elif keys.get("described") is False:
            expected = [Place(str(path), None)]
        assert theirs.places(index) == expected


def opened(tmp_path, tokenizer, **keys):
    for shard in read_foreign_shards(tmp_path, tokenizer_name_or_path=tokenizer, **keys):
        shard.verify()


def test_ids_beyond_the_vocabulary_are_named(tmp_path, tokenizer):
    write_dolma(tmp_path, documents=[*DOCUMENTS, [7, VOCAB_SIZE, EOS]])
    with pytest.raises(UserError, match=f"id number {ENDS[-1] + 1} is 300; those of .*below 300"):
        opened(tmp_path, tokenizer)


def test_ids_far_beyond_the_start_are_looked_at_before_training(tmp_path, tokenizer):
    ids = np.full(3_000_001, EOS, "<u2")
    ids[2_500_000] = 60_000
    ids.tofile(tmp_path / "a.npy")
    shards = read_foreign_shards(tmp_path, tokenizer_name_or_path=tokenizer)
    with pytest.raises(UserError, match="id number 2,500,000 is 60,000"):
        TokenSequences(shards, 16, verify=True)


def test_a_wrong_dtype_is_seen_from_the_ids(tmp_path, tokenizer):
    write_dolma(tmp_path, dtype="<u4")
    with pytest.raises(UserError, match=r"read as uint16, and every second .* dtype: uint32"):
        opened(tmp_path, tokenizer)
    write_dolma(tmp_path, documents=[*DOCUMENTS, [EOS]])  # an even number
    with pytest.raises(UserError, match=r"are below 300.*read as uint32"):
        opened(tmp_path, tokenizer, dtype="uint32")
    write_datatrove(tmp_path)
    (tmp_path / "part-0.npy").unlink()
    with pytest.raises(UserError, match="metadata says that its ids are uint16; dtype is uint32"):
        opened(tmp_path, tokenizer, dtype="uint32")


def test_a_file_that_was_cut_off_is_refused(tmp_path, tokenizer):
    path = write_dolma(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="no whole number of uint16 ids"):
        opened(tmp_path, tokenizer)
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match=f"holds {ENDS[-1] - 1} ids; .* ends at {ENDS[-1]}"):
        opened(tmp_path, tokenizer)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        opened(tmp_path, tokenizer)
    path.unlink()
    path = write_datatrove(tmp_path)
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match=f"metadata says {ENDS[-1]}"):
        opened(tmp_path, tokenizer)
    path.with_name(path.name + ".metadata").unlink()
    with pytest.raises(UserError, match=f"beside it ends at {ENDS[-1]}"):
        opened(tmp_path, tokenizer)


def test_what_stands_beside_a_file_must_be_readable(tmp_path, tokenizer):
    write_dolma(tmp_path)
    described = tmp_path / "part-0.csv.gz"
    described.write_bytes(described.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"part-0.csv.gz, line \d+ cannot be read"):
        opened(tmp_path, tokenizer)
    (tmp_path / "part-0.npy").unlink()
    path = write_datatrove(tmp_path)
    path.with_name(path.name + ".metadata").write_text("a/b|2\n")
    with pytest.raises(UserError, match="does not say the bytes of an id"):
        opened(tmp_path, tokenizer)


def test_a_mask_that_would_not_be_used_is_refused(tmp_path, tokenizer):
    path = write_datatrove(tmp_path)
    path.with_name(path.name + ".loss").write_bytes(b"\x01")
    with pytest.raises(UserError, match=r"\.ds\.loss says which ids not to learn from"):
        opened(tmp_path, tokenizer)


def test_a_wrong_end_token_is_refused(tmp_path, tokenizer):
    write_dolma(tmp_path)
    with pytest.raises(UserError, match="documents end with the id 3, not with 299"):
        opened(tmp_path, tokenizer, eos_token="t299")
    write_dolma(tmp_path, documents=[[5, 6, 7]])
    (tmp_path / "part-0.csv.gz").unlink()
    with pytest.raises(UserError, match=r"holds no 3 \(<\|endoftext\|>\) at all"):
        opened(tmp_path, tokenizer)
    with pytest.raises(UserError, match="has no token '</s>'"):
        opened(tmp_path, tokenizer, eos_token="</s>")


def test_a_real_numpy_file_is_told_from_a_shard(tmp_path, tokenizer):
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16))
    with pytest.raises(UserError, match="a NumPy file with a header"):
        opened(tmp_path, tokenizer)


def test_a_folder_is_read_in_order_of_name(tmp_path):
    for name in ("b/2.npy", "a.npy", "b/1.npy", "a.csv.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path)) for path in foreign_files(tmp_path)]
    assert found == ["a.npy", "b/1.npy", "b/2.npy"]

"""Reading documents: what is fine is read unchanged, what is not is named by file and line."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from olmo_base.corpus.documents import DocumentSource, DocumentStream, document_files
from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError, UserError


def texts_of(path, **keys):
    return [document.text for document in DocumentStream((DocumentSource(str(path), **keys),))]


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\r\nsecond\n".encode())
    assert texts_of(path) == ["first\r\nsecond\n"]


def test_each_json_line_is_a_document_packed_or_not(tmp_path):
    lines = b'{"text": "one"}\n\n{"text": "two\\n", "id": 3}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines))
    assert texts_of(tmp_path / "a.jsonl") == texts_of(tmp_path / "b.json.gz") == ["one", "two\n"]


def test_a_folder_is_read_in_order_of_name_and_other_files_are_left(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89")
    assert texts_of(tmp_path) == ["first", "second"]
    source = DocumentSource(str(tmp_path))
    assert len(document_files((source, source))) == 2


def test_only_the_first_documents_are_read_if_so_wanted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": str(n)}) + "\n" for n in range(9)) + "broken")
    assert texts_of(path, text_field="body", max_documents=3) == ["0", "1", "2"]


def test_documents_without_text_are_counted_and_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": " \\n"}\n{"text": "x"}\n{"text": ""}\n')
    counts = ExampleCounts()
    assert len(list(DocumentStream((DocumentSource(str(path)),), counts))) == 1
    assert counts.as_dict() == {"used": 1, "truncated": 0, "dropped": {"empty text": 2}}


def test_the_stream_tells_how_far_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "y" * 500}))
    stream = DocumentStream((DocumentSource(str(tmp_path)),))
    seen = [stream.bytes_read for _ in stream]
    assert seen[0] == 1000
    assert (
        stream.bytes_read
        == stream.bytes_total
        == sum(file.stat().st_size for file in tmp_path.iterdir())
    )


def test_zstandard_files_are_read_across_frames_in_any_split(tmp_path):
    lines = [json.dumps({"text": f"{n} " + "été " * (n % 7)}).encode() + b"\n" for n in range(9000)]
    content = b"".join(lines)
    pack = zstandard.ZstdCompressor().compress
    frames = pack(content[:100_001]) + pack(b"") + pack(content[100_001:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "b.jsonl").write_bytes(content)
    assert texts_of(tmp_path / "a.jsonl.zst") == texts_of(tmp_path / "b.jsonl")
    (tmp_path / "c.txt.zst").write_bytes(pack(content))
    assert texts_of(tmp_path / "c.txt.zst") == [content.decode()]


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")]
)
def test_each_row_of_a_parquet_file_is_a_document(tmp_path, kind):
    texts = [f"row {n} été\n" for n in range(1000)]
    table = pyarrow.table({"id": range(1000), "body": pyarrow.array(texts).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    stream = DocumentStream((DocumentSource(str(tmp_path), text_field="body"),))
    documents = list(stream)
    assert [document.text for document in documents] == texts
    assert [document.line for document in documents] == list(range(1, 1001))
    assert stream.bytes_read == stream.bytes_total


@pytest.mark.parametrize(
    ("column", "row", "message"),
    [
        (["good", None], 2, "'text' is null"),
        ([1, 2], None, "'text' holds int64, needed text"),
        ([b"\x00"], None, "'text' holds binary, needed text"),
        (pyarrow.array([], "string"), None, "the file is empty"),
        (pyarrow.array([b"a", b"\xe9"]).view("string"), 2, "byte 0 of 'text' is not UTF-8"),
    ],
)
def test_a_parquet_file_that_cannot_be_read_is_named_by_row(tmp_path, column, row, message):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=message) as raised:
        texts_of(path)
    assert raised.value.line == row
    with pytest.raises(DataError, match="column 'body' is missing; found 'text'"):
        texts_of(path, text_field="body")


@pytest.mark.parametrize(
    ("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_a_package_that_is_missing_is_named(tmp_path, name, package):
    (tmp_path / name).write_bytes(b"")
    code = (
        "import sys\n"
        "from olmo_base.corpus.documents import DocumentSource, source_files\n"
        "from olmo_base.run.errors import UserError\n"
        "sys.path = []  # nothing can be found any more\n"
        "try:\n"
        f"    source_files(DocumentSource({str(tmp_path)!r}))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / name} needs the package {package}")
    assert "open-instruct[data]" in done.stdout


GOOD = b'{"text": "good"}\n'
PACKED = zstandard.ZstdCompressor().compress(GOOD * 1000)


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": "cut', 2, "broken JSON"),
        ("a.jsonl", GOOD + b"\n" + b'["text"]', 3, "found a JSON list, needed an object"),
        ("a.jsonl", GOOD + b'{"body": "x", "id": 1}', 2, "'text' is missing; found 'body', 'id'"),
        ("a.jsonl", GOOD + b'{"text": null}', 2, "holds NoneType, needed text"),
        ("a.jsonl", GOOD + GOOD + b'{"text": "\xe9"}', 3, "byte 10 .0xe9. is not UTF-8"),
        ("a.jsonl", GOOD + b'{"text": "\\ud83d"}', 2, "half a surrogate pair"),
        ("a.jsonl", b"", None, "the file is empty"),
        ("a.jsonl", b"\n\n", None, "the file is empty"),
        ("a.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-20], None, "gzip data is damaged"),
        ("a.jsonl.gz", GOOD, None, "gzip data is damaged"),
        ("a.jsonl.zst", PACKED[:-1], None, "zstandard data is damaged .the file ends before"),
        ("a.jsonl.zst", PACKED + PACKED[:3], None, "the file ends before"),
        ("a.jsonl.zst", GOOD, None, "zstandard data is damaged"),
        ("a.jsonl.zst", b"", None, "the file is empty"),
        ("a.parquet", b"PAR1" + GOOD, None, "Parquet data is damaged"),
        ("a.parquet", b"", None, "Parquet data is damaged"),
        ("a.txt", b"", None, "the file is empty"),
        ("a.txt", b"caf\xe9", None, "byte 3 .0xe9. is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        texts_of(path)
    assert raised.value.line == line
    place = str(path) if line is None else f"{path}, line {line}"
    assert str(raised.value).startswith(place)


def test_a_path_that_holds_no_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        texts_of(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="holds no documents"):
        texts_of(tmp_path)
    (tmp_path / "a.arrow").write_bytes(b"ARROW1")
    with pytest.raises(UserError, match="is no document file"):
        texts_of(tmp_path / "a.arrow")

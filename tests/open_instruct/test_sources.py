"""Files, folders and data sets of any kind hold the same rows, each with its line."""

import gzip
import json
import subprocess
import sys

import pytest

from olmo_base.run.errors import DataError, UserError
from open_instruct.sources import Source, _dataset_rows, _hub_dataset, source_files
from tests.open_instruct.rows import GOOD, assistant, dialogues, turns, user, write


def test_json_lists_json_lines_and_gzip_of_both_hold_the_same_rows(tmp_path):
    rows = [{"instruction": f"q{i}", "output": "ü"} for i in range(3)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    listed = json.dumps(rows, indent=2, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(listed, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(listed.encode()))
    read = {file.name: dialogues(str(file)) for file in sorted(tmp_path.iterdir())}
    assert len(read) == 4
    for name, found in read.items():
        assert [item.messages for item in found] == [
            [user(f"q{i}"), assistant("ü")] for i in range(3)
        ], name
    assert [item.line for item in read["a.jsonl"]] == [1, 2, 3]
    assert [item.line for item in read["b.json"]] == [2, 6, 10]


def test_zstandard_and_parquet_files_hold_the_same_rows(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [turns(user(f"q{i}"), assistant("ü")) for i in range(3)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "b.json.zst").write_bytes(zstandard.compress(json.dumps(rows).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert [item.messages for item in dialogues(str(file))] == [
            row["messages"] for row in rows
        ], file
    assert [item.line for item in dialogues(str(tmp_path / "c.parquet"))] == [1, 2, 3]
    for name, end in (("a.jsonl.zst", "broken zstandard file"), ("c.parquet", "broken Parquet")):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
        with pytest.raises(DataError, match=end):
            dialogues(str(tmp_path / name))


def test_what_save_to_disk_wrote_is_read_split_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([GOOD, GOOD])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(
        str(tmp_path / "two")
    )
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert [item.messages for item in dialogues(one)] == [GOOD["messages"]] * 2
    assert [item.line for item in dialogues(Source(two, split="train"))] == [1, 2]
    assert [item.line for item in dialogues(Source(two, split="test"))] == [1]
    assert any(file.suffix == ".arrow" for file in source_files([Source(two)]))
    with pytest.raises(UserError, match="has no split 'validation'; it has train, test"):
        dialogues(Source(two, split="validation"))


def test_a_folder_is_all_its_files_in_order_whatever_their_formats(tmp_path):
    write(tmp_path / "2.jsonl", {"prompt": "q", "completion": "second"})
    write(tmp_path / "1.jsonl", {"instruction": "q", "output": "first"})
    (tmp_path / "README.md").write_text("not data")
    assert [item.messages[-1]["content"] for item in dialogues(str(tmp_path))] == [
        "first",
        "second",
    ]
    assert source_files([Source(str(tmp_path))]) == [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    for path in (str(tmp_path / "no.jsonl"), "../no/such", "no.json.gz"):
        with pytest.raises(UserError, match="does not exist"):
            source_files([Source(path)])


def test_a_folder_without_data_and_an_unread_kind_of_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no data file"):
        dialogues(str(tmp_path))
    (tmp_path / "rows.csv").write_bytes(b"q,a")
    with pytest.raises(DataError, match="Convert it to JSON lines"):
        dialogues(str(tmp_path / "rows.csv"))


def test_a_data_set_of_the_hub_that_cannot_be_fetched_is_refused_by_name():
    pytest.importorskip("datasets")
    for read in (dialogues, lambda name: source_files([Source(name)])):
        with pytest.raises(UserError, match=r"no file or folder nobody/nothing here.*could not be"):
            read("nobody/nothing")


def test_without_the_datasets_package_the_hub_needs_an_install():
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from olmo_base.run.artefact import ExampleCounts\n"
        "from open_instruct.examples import Source, read_dialogues\n"
        "read_dialogues([Source('a/b')], seed=0, on_bad_row='error', counts=ExampleCounts())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError" in done.stderr
    assert "pip install 'open-instruct[data]'" in done.stderr


def test_rows_that_the_datasets_package_loads_are_numbered(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "train.jsonl", *[GOOD] * 2)
    # The package loads a folder as it loads a hub's repository.
    source = Source(str(tmp_path))
    rows = list(_dataset_rows(_hub_dataset(source), source))
    assert [row.value for row in rows] == [GOOD] * 2
    assert [(row.source, row.line) for row in rows] == [(f"{tmp_path} (train)", n) for n in (1, 2)]
    with pytest.raises(UserError, match=r"split nosuch\) it could not be loaded: .*nosuch"):
        _hub_dataset(Source(str(tmp_path), split="nosuch"))


def test_a_bad_row_of_a_json_list_is_named_by_row_and_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, turns(), GOOD], indent=1))
    line = path.read_text()[: path.read_text().index('"messages": []')].count("\n")
    with pytest.raises(DataError, match=f"line {line}: row 2: .*no turns"):
        dialogues(str(path))


def test_a_broken_json_list_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.json"
    for text, line, message in (
        ("[\n{},\n{\n", 4, "broken JSON: .* row 2"),
        ("[\n{}\n{}]", 3, "a comma or ] must follow row 1"),
        ("[\n{}\n]\n[]", 4, "text after the end"),
        ("[\n]", 2, "this JSON list is empty"),
        ("[", 1, "broken JSON"),
        ('[\n"\udcff"]', 2, "not UTF-8"),
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(DataError, match=message) as error:
            dialogues(str(path), on_bad_row="drop")
        assert error.value.line == line, text


def test_an_empty_file_is_refused(tmp_path):
    for name, content in (
        ("a.jsonl", b""),
        ("b.json", b" \n\n"),
        ("c.jsonl.gz", gzip.compress(b"", mtime=0)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: this file is empty"):
            dialogues(str(tmp_path / name))


def test_a_broken_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(json.dumps(GOOD).encode() * 50, mtime=0)
    for content in (b"{}", whole[:-20], whole[:30] + b"xxxx" + whole[34:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match="broken gzip file"):
            dialogues(str(tmp_path / "rows.jsonl.gz"))

"""Questions looked for in training text of every kind, and the scores without them."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from eval.contamination import (
    note_overlaps,
    question_texts,
    read_overlaps,
    training_texts,
)
from eval.items import Choice, Document, Foreign, Question
from eval.report import write_report
from eval.report.gather import gather
from eval.scores import estimate
from olmo_base.corpus.shards import Place, ShardWriter, vocab_size_of
from olmo_base.run.artefact import sha256_file
from olmo_base.run.errors import DataError, UserError
from open_instruct.examples import Message
from tests.eval.conftest import write_json

SEEN = "the quick brown fox jumps over the lazy dog and then runs far away home"
UNSEEN = "a slow green snail crawls under the busy cat but never gets quite that far today"


def found_in(folder, *paths) -> set[str]:
    """Which of three questions are found, by name."""
    folder.mkdir(exist_ok=True)
    texts = {"task": [("seen", SEEN), ("unseen", UNSEEN), ("short", "what is it")]}
    logged: list[str] = []
    note_overlaps(folder, [str(path) for path in paths], texts, logged.append)
    contamination = read_overlaps(folder)
    assert contamination is not None
    overlap = contamination.tasks["task"]
    assert overlap.too_short == {"short"} and overlap.n == 3
    return set(overlap.overlapping)


def test_each_kind_of_training_file_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    line = json.dumps({"text": f"Once, {SEEN}."})
    dialogue = {"messages": [{"role": "user", "content": f"{SEEN}?"}]}
    (tmp_path / "a.txt").write_text(SEEN)
    (tmp_path / "b.jsonl").write_text(line)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(line.encode()))
    parquet.write_table(pyarrow.table({"text": ["x", SEEN]}), tmp_path / "e.parquet")
    (tmp_path / "f.jsonl").write_text(json.dumps(dialogue))
    (tmp_path / "g.json").write_text(json.dumps([dialogue, dialogue], indent=1))
    (tmp_path / "h.json.gz").write_bytes(gzip.compress(json.dumps([dialogue]).encode()))
    for number, path in enumerate(sorted(tmp_path.glob("[a-h].*"))):
        assert found_in(tmp_path / f"note{number}", path) == {"seen"}, path.name
    assert number == 7
    (tmp_path / "other.txt").write_text("nothing of the kind")
    assert found_in(tmp_path / "none", tmp_path / "other.txt") == set()


@pytest.fixture
def shards(tmp_path):
    """Three documents as token shards, with their tokenizer two folders above."""
    documents = ["something else", SEEN, " ".join(UNSEEN.split()[:10])]
    kinds = ["<end>", *dict.fromkeys(" ".join([*documents, UNSEEN]).split())]
    vocabulary = {kind: number for number, kind in enumerate(kinds)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "run" / "tokens" / "train"
    folder.mkdir(parents=True)
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    return folder, tokenizer, documents


def write_shards(folder, tokenizer, documents) -> None:
    writer = ShardWriter(
        folder,
        vocab_size=vocab_size_of(tokenizer),
        eos_token_id=0,
        tokenizer_sha256=sha256_file(folder.parents[1] / "tokenizer.json"),
        tokens_per_shard=1000,
    )
    for number, document in enumerate(documents, start=1):
        ids = np.array([*tokenizer.encode(document).ids, 0], dtype=np.uint16)
        places = [Place("text.jsonl", number)]
        writer.add(ids, np.array([len(ids)]), places=places, num_bytes=len(document))
    writer.close()


def test_token_shards_are_decoded_document_by_document(tmp_path, shards):
    write_shards(*shards)
    folder, _, documents = shards
    assert list(training_texts(tmp_path / "run")) == documents
    assert found_in(tmp_path / "note", tmp_path / "run") == {"seen"}
    assert found_in(tmp_path / "note", folder) == {"seen"}


def test_words_across_a_piece_of_a_long_document_are_found(tmp_path, shards, monkeypatch):
    folder, tokenizer, _ = shards
    filler = "nothing of interest stands here".split() * 400
    words = [*filler, *SEEN.split(), *filler]
    kinds = {kind: number for number, kind in enumerate(["<end>", *dict.fromkeys(words)])}
    tokenizer.model = models.WordLevel(kinds, unk_token="<end>")
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    write_shards(folder, tokenizer, [" ".join(words)])
    monkeypatch.setattr("eval.contamination.TOKENS_AT_A_TIME", 2004)  # ends within SEEN
    assert len(list(training_texts(folder))) > 2
    assert found_in(tmp_path / "note", folder) == {"seen"}


def test_shards_without_their_tokenizer_are_refused(tmp_path, shards):
    write_shards(*shards)
    other = tmp_path / "run" / "tokenizer.json"
    content = json.loads(other.read_text())
    other.write_text(json.dumps(content | {"version": "1.0", "added_tokens": []}))
    with pytest.raises(UserError, match="was not made with the tokenizer"):
        list(training_texts(tmp_path / "run"))
    other.unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json to decode"):
        list(training_texts(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "does not exist. Give the files that the models were trained on"),
        ("a.pdf", "", "is no document file"),
        ("a.jsonl", '{"a": 1', "broken JSON"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "line 2: 'text' holds int"),
    ],
)
def test_training_text_that_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / (name or "missing.jsonl")
    if name is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(training_texts(path))


def test_what_is_looked_for_is_the_question_without_examples_and_with_its_answer():
    turn: Message = {"role": "user", "content": "an example"}
    asked = Question("0", (turn, turn), ("yes",))
    choice = Choice("1", "Why?", ("Q: other\n\nQ: Why?",) * 2, (" so", " no"), gold=1)
    text = Document("2", "x" * 4000 + "y" * 10)
    rows = [{"doc_id": "3", "question": "Who?", "target": " I"}]
    assert question_texts([asked, choice, text, Foreign("3")], rows) == [
        ("0", "an example"),
        ("1", "Why? no"),
        ("2:0", "x" * 4000),
        ("2:1", "y" * 10),
        ("3", "Who?  I"),
    ]


def test_what_was_noted_is_kept_until_questions_or_files_change(tmp_path):
    train = tmp_path / "train.txt"
    train.write_text(SEEN)
    assert found_in(tmp_path / "e", train) == {"seen"}
    note = tmp_path / "e" / "contamination.json"
    before = note.stat().st_mtime_ns
    assert found_in(tmp_path / "e", train) == {"seen"}
    assert note.stat().st_mtime_ns == before
    train.write_text(f"{SEEN} {UNSEEN}")
    assert found_in(tmp_path / "e", train) == {"seen", "unseen"}


def test_scores_without_the_overlapping_questions_stand_in_every_report(make_evaluation):
    folder = make_evaluation(n=60)
    overlapping = [str(number) for number in range(0, 60, 3)]
    task = {"overlapping": overlapping, "too_short": ["1"], "n": 60}
    source = {"path": "train.jsonl", "texts": 1, "characters": 9}
    write_json(
        folder / "contamination.json",
        {"key": "", "ngram": 13, "sources": [source], "tasks": {"sort": task}},
    )
    page = write_report([folder]).read_text()
    rows = [
        json.loads(line)
        for line in (folder / "samples" / "sft" / "sort.jsonl").read_text().splitlines()
    ]
    clean = [row for row in rows if int(row["doc_id"]) % 3]
    expected = estimate(clean, "exact_match")
    content = json.loads((folder / "report.json").read_text())
    sft = content["models"][1]
    assert sft["without_overlap"]["sort"]["value"] == expected.value
    assert sft["without_overlap"]["sort"]["n"] == 40
    assert content["contamination"][0]["tasks"]["sort"]["overlapping"] == sorted(overlapping)
    value = gather([folder]).models[1].tasks["sort"].metrics["exact_match"].value
    words = f"{100 * value:.1f} → {100 * expected.value:.1f}"
    assert words in page and words in (folder / "report.md").read_text()


def test_a_broken_note_is_named(make_evaluation):
    folder = make_evaluation(n=5)
    for content in ("{", '{"ngram": 13}', "[]"):
        (folder / "contamination.json").write_text(content)
        with pytest.raises(DataError, match=r"contamination\.json"):
            gather([folder])


def test_memory_does_not_grow_with_the_training_text(tmp_path):
    peaks = []
    line = json.dumps({"text": "words that nobody asks for, again and again. " * 40}) + "\n"
    for number in (20, 2000):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line * number)
        tracemalloc.start()
        found_in(tmp_path / f"note{number}", path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] and peaks[1] < path.stat().st_size / 2

"""Token shards: every document once, ended, in the right split, the same for any process count."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from olmo_base.corpus.documents import DocumentSource
from olmo_base.corpus.encode import Encoder
from olmo_base.corpus.shards import dtype_for, read_shards, vocab_size_of
from olmo_base.corpus.tokenize import TokenizeRecipe, input_files, is_held_out, plan, run
from olmo_base.run.artefact import RunConfig, sha256_file
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import RecipeError
from olmo_base.tokenizer import TokenizerRecipe, load_tokenizer
from olmo_base.tokenizer import run as train_tokenizer

TEXTS = [f"Document {n} speaks of <|endoftext|> and of été number {n * n}.\n" for n in range(300)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with documents and a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "documents.jsonl").write_text(lines)
    source = (DocumentSource(str(folder / "documents.jsonl")),)
    train_tokenizer(
        TokenizerRecipe("tokenizer", source, RunConfig(str(folder / "tokenizer")), vocab_size=350)
    )
    return folder


def recipe_for(home, output_dir, **keys) -> TokenizeRecipe:
    source = (DocumentSource(str(home / "documents.jsonl")),)
    return TokenizeRecipe(
        "tokenize",
        keys.pop("tokenizer", str(home / "tokenizer")),
        keys.pop("dataset_mixer", source),
        RunConfig(str(output_dir)),
        **keys,
    )


def documents_in(folder, tokenizer, eos_token_id=0):
    """The texts of a split, read back from its ids."""
    found: list[str] = []
    for shard in read_shards(folder):
        ids = shard.tokens()
        ends = np.flatnonzero(ids == eos_token_id)
        assert len(ends) == shard.info.num_documents
        assert ends[-1] == len(ids) - 1
        parts = np.split(np.asarray(ids), ends + 1)[:-1]
        found.extend(
            tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts
        )
    return found


def test_shards_hold_every_document_in_order_with_one_end_token_each(home, tmp_path):
    folder = run(recipe_for(home, tmp_path / "run", tokens_per_shard=1000)).path
    shards = read_shards(folder / "tokens" / "train")
    tokenizer = load_tokenizer(home / "tokenizer")
    assert documents_in(folder / "tokens" / "train", tokenizer) == TEXTS
    assert sum(shard.info.num_bytes for shard in shards) == sum(len(t.encode()) for t in TEXTS)
    for shard in shards:
        shard.verify()
        assert shard.info.dtype == "uint16"
        assert shard.info.vocab_size == vocab_size_of(tokenizer)
        assert shard.info.tokenizer_sha256 == sha256_file(folder / "tokenizer.json")
    places = [place for shard in shards for place in shard.places(0, shard.info.num_tokens)]
    lines = (home / "documents.jsonl").read_text().splitlines()
    assert [json.loads(lines[(place.line or 0) - 1])["text"] for place in places] == TEXTS
    assert {place.path for place in places} == {str(home / "documents.jsonl")}


def test_the_number_of_processes_changes_nothing(home, tmp_path):
    source = DocumentSource(str(home / "documents.jsonl"))
    mixers = (source,) * 40  # more than one batch
    written = []
    for num_proc in (1, 3):
        recipe = recipe_for(
            home,
            tmp_path / str(num_proc),
            dataset_mixer=mixers,
            num_proc=num_proc,
            eval_fraction=0.1,
            tokens_per_shard=150_000,
        )
        folder = run(recipe).path / "tokens"
        written.append({str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*.*")})
    assert written[0] == written[1]
    assert len(written[0]) > 4  # several shards of two files


def test_held_out_documents_are_never_learnt_from(home, tmp_path):
    source = DocumentSource(str(home / "documents.jsonl"))
    recipe = recipe_for(home, tmp_path / "run", dataset_mixer=(source, source), eval_fraction=0.2)
    folder = run(recipe).path / "tokens"
    tokenizer = load_tokenizer(home / "tokenizer")
    train = documents_in(folder / "train", tokenizer)
    held_out = documents_in(folder / "eval", tokenizer)
    assert sorted(train + held_out) == sorted(TEXTS * 2)
    assert set(train).isdisjoint(held_out)
    assert 60 < len(held_out) < 180
    held_out_now = {text for text in TEXTS if is_held_out(text, fraction=0.2, seed=42)}
    assert set(held_out) == held_out_now
    assert held_out_now != {text for text in TEXTS if is_held_out(text, fraction=0.2, seed=43)}


def test_held_out_documents_can_be_named(home, tmp_path):
    (tmp_path / "eval.txt").write_text("held out")
    recipe = recipe_for(
        home, tmp_path / "run", eval_dataset_mixer=(DocumentSource(str(tmp_path / "eval.txt")),)
    )
    folder = run(recipe).path
    tokenizer = load_tokenizer(folder)
    assert documents_in(folder / "tokens" / "eval", tokenizer) == ["held out"]
    results = json.loads((folder / "manifest.json").read_text())["results"]
    assert results["eval_documents"] == 1
    assert results["train_documents"] == len(TEXTS)
    with pytest.raises(RecipeError, match="keep one of the two"):
        recipe_for(home, tmp_path, eval_dataset_mixer=recipe.dataset_mixer, eval_fraction=0.1)


def test_a_split_that_stays_empty_is_refused(home, tmp_path):
    one = (DocumentSource(str(home / "documents.jsonl"), max_documents=1),)
    with pytest.raises(UserError, match="holds out none of the 1 documents"):
        run(recipe_for(home, tmp_path / "a", dataset_mixer=one, eval_fraction=1e-9))
    with pytest.raises(UserError, match="No document is left to learn from"):
        run(recipe_for(home, tmp_path / "b", dataset_mixer=one, eval_fraction=1 - 1e-9))
    assert not (tmp_path / "b" / "tokens").exists()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_broken_line_ends_the_run_and_leaves_no_shards(home, tmp_path, num_proc):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    recipe = recipe_for(
        home, tmp_path / "run", dataset_mixer=(DocumentSource(str(path)),), num_proc=num_proc
    )
    with pytest.raises(DataError, match="line 2: broken JSON"):
        run(recipe)
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {
        "manifest.json",
        "recipe.yaml",
        "train.log",
        ".lock",
    }


# Runs a recipe and gets a signal when the named file is about to be made, or to get its name.
KILLED_AT = """
import os, signal, sys
from olmo_base.__main__ import main

def die(event, arguments):
    is_made = event == "open" and "w" in str(arguments[1]) and str(arguments[0]).endswith(last)
    if is_made or event == "os.rename" and str(arguments[1]).endswith(last):
        os.kill(os.getpid(), signal_number)

if __name__ == "__main__":
    last, signal_number = sys.argv[1], int(sys.argv[2])
    sys.addaudithook(die)
    sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def long_run(home, tmp_path_factory):
    """A recipe of several shards, and the folder that an uninterrupted run of it wrote."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "killed.py").write_text(KILLED_AT)
    source = f"{{path: {home}/documents.jsonl}}"
    (folder / "recipe.yaml").write_text(
        f"stage: tokenize\ntokenizer_name_or_path: {home}/tokenizer\n"
        f"dataset_mixer: [{', '.join([source] * 120)}]\n"
        "tokens_per_shard: 100000\neval_fraction: 0.2\n"
    )
    run_recipe(folder, "nothing", folder / "whole")
    assert len(list((folder / "whole" / "tokens" / "train").glob("*.bin"))) == 4
    return folder


def run_recipe(folder, last, output_dir, *, signal_number=signal.SIGKILL, num_proc=1):
    return subprocess.run(
        [
            *(sys.executable, folder / "killed.py", last, str(int(signal_number))),
            *(folder / "recipe.yaml", f"output_dir={output_dir}", f"num_proc={num_proc}"),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def content_of(folder):
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*.*")}


def test_a_run_that_is_killed_again_and_again_writes_the_same_and_nothing_twice(long_run, tmp_path):
    folder, whole = tmp_path / "run", long_run / "whole"
    written: dict[str, tuple[int, int]] = {}  # finished shard -> inode, time of writing

    def remember(split):
        for path in split.glob("tokens_*.json"):
            status = path.with_suffix(".bin").stat()
            assert written.setdefault(path.stem, (status.st_ino, status.st_mtime_ns)) == (
                status.st_ino,
                status.st_mtime_ns,
            )
        return len(written)

    unfinished = folder / ".tokens.unfinished" / "train"
    for last, num_proc, num_kept in (
        ("train/tokens_00001.origin", 2, 1),  # the next shard is half begun
        ("train/tokens_00001.json", 1, 1),  # the shard is written, its description is not
        ("train/tokens_00003.bin", 1, 3),
        ("run/tokens", 1, 4),  # all is written, and has not its name yet
    ):
        killed = run_recipe(long_run, last, folder, num_proc=num_proc)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert ("going on after" in killed.stderr) == (last != "train/tokens_00001.origin")
        assert remember(unfinished) == num_kept
    # all has its name, and the run is not called finished
    assert run_recipe(long_run, "run/tokenizer.json", folder).returncode == -signal.SIGKILL
    done = run_recipe(long_run, "nothing", folder)
    assert done.returncode == 0, done.stderr
    assert remember(folder / "tokens" / "train") == 4
    assert content_of(folder / "tokens") == content_of(whole / "tokens")
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (folder, whole)]
    for key in ("results", "examples"):
        assert manifests[0][key] == manifests[1][key]


def test_a_stopped_run_keeps_its_finished_shards_and_a_damaged_one_is_made_again(
    long_run, tmp_path
):
    folder = tmp_path / "run"
    stopped = run_recipe(
        long_run, "train/tokens_00002.origin", folder, signal_number=signal.SIGTERM
    )
    assert stopped.returncode == 0
    assert "finished shards are kept" in stopped.stderr
    assert not (folder / "tokens").exists()
    path = folder / ".tokens.unfinished" / "train" / "tokens_00001.bin"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    assert run_recipe(long_run, "nothing", folder).returncode == 0
    assert content_of(folder / "tokens") == content_of(long_run / "whole" / "tokens")


def test_memory_does_not_grow_with_the_input(home, tmp_path):
    program = (
        "import sys\nfrom olmo_base.__main__ import main\nassert main(sys.argv[1:]) == 0\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])"
    )
    peaks = []
    for num_lines in (1000, 5000):
        path = tmp_path / f"{num_lines}.jsonl"
        path.write_text((json.dumps({"text": "word " * 200}) + "\n") * num_lines)
        (tmp_path / "recipe.yaml").write_text(
            f"stage: tokenize\ntokenizer_name_or_path: {home}/tokenizer\n"
            f"dataset_mixer: [{{path: {path}}}]\noutput_dir: {tmp_path}/{num_lines}\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "recipe.yaml"],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        peaks.append(int(done.stdout.split()[-1]) // 1024)
    assert peaks[1] - peaks[0] < 3  # MB, for 4 MB more of input


def test_ids_beyond_65535_are_written_as_uint32(tmp_path):
    assert dtype_for(65_536) == "uint16"
    assert dtype_for(65_537) == "uint32"
    vocabulary = {"a": 3, "b": 70_000}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    assert vocab_size_of(tokenizer) == 70_001  # the largest id counts, not the number of tokens
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "a.txt").write_text("abba")
    recipe = TokenizeRecipe(
        "tokenize",
        str(tmp_path / "tokenizer.json"),
        (DocumentSource(str(tmp_path / "a.txt")),),
        RunConfig(str(tmp_path / "run")),
        eos_token="b",
    )
    (shard,) = read_shards(run(recipe).path / "tokens" / "train")
    assert shard.info.dtype == "uint32"
    assert shard.tokens().tolist() == [3, 70_000, 70_000, 3, 70_000]
    with pytest.raises(OverflowError):
        Encoder(tokenizer, eos_token_id=3, dtype="uint16")(["b"])


def test_a_tokenizer_without_the_end_token_is_refused(home, tmp_path):
    with pytest.raises(UserError, match="has no token '</s>' to end a document with"):
        run(recipe_for(home, tmp_path / "run", eos_token="</s>"))


def test_a_finished_run_is_not_done_again_and_a_changed_one_is_refused(home, tmp_path):
    recipe = recipe_for(home, tmp_path / "run")
    written = run(recipe).path / "tokens" / "train" / "tokens_00000.bin"
    time_written = written.stat().st_mtime_ns
    assert run(recipe).is_finished
    assert written.stat().st_mtime_ns == time_written
    with pytest.raises(UserError, match=r"eval_fraction was 0\.0 and is 0\.5"):
        run(recipe_for(home, tmp_path / "run", eval_fraction=0.5))


def test_shards_that_were_tampered_with_are_refused(home, tmp_path):
    folder = run(recipe_for(home, tmp_path / "run")).path / "tokens" / "train"
    path = folder / "tokens_00000.bin"
    content = path.read_bytes()
    path.write_bytes(b"\x01" + content[1:])
    with pytest.raises(UserError, match="SHA-256 differs"):
        read_shards(folder)[0].verify()
    path.write_bytes(content)
    origin = path.with_suffix(".origin")
    original = origin.read_bytes()
    origin.write_bytes(original[:-1] + b"\x01")
    with pytest.raises(UserError, match="origin is not what was written"):
        read_shards(folder)[0].verify()
    origin.write_bytes(original[:-1])
    with pytest.raises(UserError, match=r"origin has \d+ bytes; its description says"):
        read_shards(folder)
    origin.unlink()
    with pytest.raises(UserError, match="origin is missing"):
        read_shards(folder)
    origin.write_bytes(original)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="its description says"):
        read_shards(folder)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a shard's description"):
        read_shards(folder)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="is missing beside"):
        read_shards(folder)
    path.unlink()
    with pytest.raises(UserError, match="holds no token shards"):
        read_shards(folder)


def test_the_plan_is_near_what_a_run_writes_and_touches_nothing(home, tmp_path):
    recipe = recipe_for(home, tmp_path / "run", eval_fraction=0.1)
    planned = plan(recipe)
    assert not (tmp_path / "run").exists()
    results = json.loads((run(recipe).path / "manifest.json").read_text())["results"]
    assert planned["documents"] == results["train_documents"]
    assert planned["eval_documents"] == results["eval_documents"]
    total = results["train_tokens"] + results["eval_tokens"]
    assert planned["tokens"] == pytest.approx(total, rel=0.02)
    assert {path.name for path in input_files(recipe)} >= {"tokenizer.json", "documents.jsonl"}

"""Text tokenized per second of processor time: ours, datatrove's and dolma's; and peak memory.

    python benchmarks/tokenizing.py TEXT TOKENIZER_JSON [--datatrove SITE] [--dolma SITE]
    python benchmarks/tokenizing.py TEXT TOKENIZER_JSON --memory 200 2000

TEXT is a JSONL file (or .gz) of documents. Each candidate turns copies of it into its token files
in a process of its own, without parallelism. What a process costs before it has text (imports,
plans) is taken off by running it on two sizes. SITE is a folder made by 'pip install --target',
since the peers do not go into one environment with us, or with each other.

--memory makes inputs of so many MB and prints the peak memory of our processes for each. The name
is not tokenize.py: beside another script that would hide Python's own module.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

OURS = """
import sys
from olmo_base.__main__ import main
sys.exit(main([sys.argv[1]]))
"""
DATATROVE = """
import json, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
s = json.load(open(sys.argv[1]))
LocalPipelineExecutor(
    [
        JsonlReader(s["folder"], compression=None),
        DocumentTokenizer(
            s["output"], tokenizer_name_or_path=s["tokenizer"], eos_token=s["eos"],
            shuffle_documents=False, batch_size=1000,
        ),
    ],
    tasks=1, workers=1, logging_dir=s["output"] + "/logs",
).run()
"""
DOLMA = """
import json, sys
from dolma.tokenizer import tokenize_in_parallel
if __name__ == "__main__":
    s = json.load(open(sys.argv[1]))
    tokenize_in_parallel(
        sources=[s["folder"] + "/*.jsonl"], destination=s["output"], num_writers=1,
        tokenizer_name_or_path=s["tokenizer"], eos_token_id=s["eos_id"], pad_token_id=s["eos_id"],
        bos_token_id=None, dtype=s["dtype"], sample_ring_prop=False, local_shuffle=1000, seed=1,
        debug=False, ring_size=1, max_size=2**31, metadata_dir=None, refresh_tokenizer=0,
    )
"""


class Cost(NamedTuple):
    """What a process and its children took."""

    cpu_seconds: float
    peak_bytes: int


def run_alone(program: str, argument: Path, site: str | None) -> Cost:
    """Run a program to its end, one thread of it. Errors: SystemExit with what it printed last."""
    paths = [site] if site else [str(Path(__file__).parents[1])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file, tempfile.TemporaryFile() as words:
        file.write(program)
        file.flush()
        alone = ["-S"] if site else []  # a peer sees its own packages only
        process = subprocess.Popen(
            [sys.executable, *alone, file.name, str(argument)],
            env=environment,
            stdout=words,
            stderr=words,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            words.seek(0)
            raise SystemExit(words.read().decode(errors="replace")[-2000:])
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def write_copies(text: Path, num_bytes: int, folder: Path) -> int:
    """Documents of ``text`` over and over, up to so many bytes; how many bytes of text they hold.

    Each copy of a document begins with its number, so that no two are alike.
    """
    opened = gzip.open if text.suffix == ".gz" else open
    with opened(text, "rt", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    folder.mkdir()
    written = held = number = 0
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        while written < num_bytes:
            content = f"{number} {documents[number % len(documents)]}"
            number += 1
            held += len(content.encode())
            line = json.dumps({"id": str(number), "text": content}, ensure_ascii=False) + "\n"
            written += len(line.encode())
            file.write(line)
    return held


def settings_for(name: str, options: argparse.Namespace, folder: Path, output: Path) -> Path:
    """The file that tells a candidate what to do."""
    if name == "open-instruct":
        content: dict[str, object] = {
            "stage": "tokenize",
            "dataset_mixer": [{"path": str(folder / "documents.jsonl")}],
            "tokenizer_name_or_path": options.tokenizer,
            "eos_token": options.eos,
            "num_proc": 1,
            "output_dir": str(output),
        }
    else:
        vocabulary = json.loads(Path(options.tokenizer).read_text(encoding="utf-8"))
        added = {item["content"]: item["id"] for item in vocabulary["added_tokens"]}
        content = {
            "folder": str(folder),
            "output": str(output),
            "tokenizer": options.tokenizer,
            "eos": options.eos,
            "eos_id": added[options.eos],
            "dtype": "uint16" if len(vocabulary["model"]["vocab"]) < 2**16 else "uint32",
        }
    path = output.with_suffix(".json")
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def rates(options: argparse.Namespace) -> dict[str, float]:
    """Bytes of text per second of processor time; the best of the turns of each candidate."""
    candidates = {"open-instruct": (OURS, None)}
    if options.datatrove:
        candidates["datatrove"] = (DATATROVE, options.datatrove)
    if options.dolma:
        candidates["dolma"] = (DOLMA, options.dolma)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small, large = root / "small", root / "large"
        num_small = write_copies(Path(options.text), 1_000_000, small)
        num_large = write_copies(Path(options.text), int(options.megabytes * 1e6), large)
        best: dict[str, dict[Path, float]] = {name: {} for name in candidates}
        for turn in range(options.turns):
            for candidate, (program, site) in candidates.items():
                for folder in (small, large):
                    output = root / f"{candidate}-{folder.name}-{turn}"
                    settings = settings_for(candidate, options, folder, output)
                    cost = run_alone(program, settings, site).cpu_seconds
                    best[candidate][folder] = min(best[candidate].get(folder, cost), cost)
    return {
        candidate: (num_large - num_small) / (seconds[large] - seconds[small])
        for candidate, seconds in best.items()
    }


def print_memory(options: argparse.Namespace, sizes: Sequence[int]) -> None:
    """The peak memory of our tokenize run for inputs of these sizes, in MB."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            write_copies(Path(options.text), size * 10**6, root / "input")
            settings = settings_for("open-instruct", options, root / "input", root / "output")
            started = time.perf_counter()
            cost = run_alone(OURS, settings, None)
            print(
                f"{size:>6,} MB of JSONL: peak memory {cost.peak_bytes / 2**20:,.0f} MiB, "
                f"{cost.cpu_seconds:,.0f} s of processor time, "
                f"{time.perf_counter() - started:,.0f} s",
                flush=True,
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text")
    parser.add_argument("tokenizer", help="a tokenizer.json")
    parser.add_argument("--eos", default="<|endoftext|>")
    parser.add_argument("--datatrove", metavar="SITE")
    parser.add_argument("--dolma", metavar="SITE")
    parser.add_argument("--megabytes", type=float, default=40.0, help="of the larger input")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="+", metavar="MB")
    options = parser.parse_args()
    if options.memory:
        print_memory(options, options.memory)
        return
    found = rates(options)
    for name, rate in found.items():
        print(
            f"{name:<16}{rate / 1e6:>8.2f} MB of text per processor second   "
            f"open-instruct / this {found['open-instruct'] / rate:5.2f}"
        )


if __name__ == "__main__":
    main()

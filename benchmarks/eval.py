"""Questions per second of our evaluation and of lm-eval with its own model, on the same requests.

    python benchmarks/eval.py --tokenizer FILE [--gsm8k FOLDER] [--docs 200] [--only mc_5shot]

Both are asked the same texts of a random OLMo-2 of 6.6M parameters: questions of everyday length
made of random words, scored without examples, after five, and by letters after five; and GSM8K
after four solved problems, answered with 64 new tokens (``--gsm8k`` holds gsm8k_test.jsonl.gz and
gsm8k_train.jsonl.gz). Each engine runs in a process of its own, started anew for each task, whose
peak memory counts from its start, imports included: lm-eval by its simple API, ours as
``open-instruct eval`` runs it, cache included. Timed are the requests, tokenising included.
Engines take turns, and of ``--rounds`` the best counts. Printed with ratios and the largest
difference of a log-probability.
"""

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

VOCABULARY = 50_304
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
TASKS = ("rc_0shot", "rc_5shot", "mc_5shot", "generate_4shot")
NEW_TOKENS = 64
STOCK_BATCH = 8  # its logits of 32 long rows are 7 GB, and it holds them twice
STOCK_GENERATION_BATCH = 64  # of an answer it makes one row of logits; ours has as many rows


# ---------------------------------------------------------------- what both are asked


def write_world(folder: Path, tokenizer: str, num_docs: int, gsm8k: Path | None) -> None:
    """A model's folder, lm-eval's task files with their data, and the same requests for ours."""
    from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    end = "<|endoftext|>"
    words = PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token=end, pad_token=end)
    config = Olmo2Config(**SHAPE, eos_token_id=words.eos_token_id, pad_token_id=words.eos_token_id)
    Olmo2ForCausalLM(config).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    chance = random.Random(0)
    vocabulary = [word.lstrip("Ġ") for word in words.get_vocab()]
    vocabulary = sorted({word.lower() for word in vocabulary if word.isalpha() and len(word) > 3})

    def sentence(low: int, high: int) -> str:
        return " ".join(chance.choices(vocabulary, k=chance.randint(low, high)))

    for split, number in (("test", num_docs), ("dev", 5)):
        rows = [
            {
                "question": sentence(20, 40),
                "choices": [sentence(8, 20) for _ in range(4)],
                "gold": chance.randrange(4),
            }
            for _ in range(number)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    if gsm8k is not None:
        for split, number in (("test", num_docs), ("train", 4)):
            with gzip.open(gsm8k / f"gsm8k_{split}.jsonl.gz", "rt", encoding="utf-8") as file:
                kept = [line for line, _ in zip(file, range(number), strict=False)]
            # Without the calculator's notes, which our reader leaves out.
            text = re.sub("<<[^<>]*>>", "", "".join(kept))
            (folder / f"gsm8k_{split}.jsonl").write_text(text, encoding="utf-8")
    (folder / "tasks").mkdir()
    for name in TASKS:
        content = yaml.safe_dump({"task": name} | definition(folder, name))
        (folder / "tasks" / f"{name}.yaml").write_text(content, encoding="utf-8")


def write_requests(folder: Path, name: str) -> None:
    """What lm-eval asks in a task of choices, as the file of one of our tasks."""
    shown = ["dev", "test"] if name[-5] != "0" else ["test"]
    rows = {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in shown
    }
    letters = list("ABCD")

    def question(row: dict[str, Any]) -> str:
        listed = zip(letters, row["choices"], strict=True)
        lines = "".join(f"\n {letter}. {choice}" for letter, choice in listed)
        return f"Question: {row['question']}{lines if name.startswith('mc') else ''}\nAnswer:"

    def options(row: dict[str, Any]) -> list[str]:
        return letters if name.startswith("mc") else row["choices"]

    examples = "".join(
        f"{question(row)} {options(row)[row['gold']]}\n\n" for row in rows.get("dev", [])
    )
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for number, row in enumerate(rows["test"]):
            for index, option in enumerate(options(row)):
                request = {"context": examples + question(row), "continuation": f" {option}"}
                line = {"doc_id": number, "idx": index, "label": row["gold"], "request": request}
                file.write(json.dumps(line) + "\n")


def definition(folder: Path, name: str) -> dict[str, Any]:
    """One of TASKS for lm-eval."""
    files = {split: str(folder / f"{split}.jsonl") for split in ("test", "dev")}
    asked: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": int(name[-5]),
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "target_delimiter": " ",
    }
    if name.startswith("generate"):
        splits = {split: str(folder / f"gsm8k_{split}.jsonl") for split in ("test", "train")}
        return asked | {
            "dataset_kwargs": {"data_files": splits, "cache_dir": str(folder / "cache")},
            "fewshot_split": "train",
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["Question:"], "max_gen_toks": NEW_TOKENS},
            "metric_list": [{"metric": "exact_match"}],
        }
    asked |= {
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    if name.startswith("mc"):
        lines = "".join(f"\n {letter}. {{{{choices[{n}]}}}}" for n, letter in enumerate("ABCD"))
        asked |= {
            "doc_to_text": "Question: {{question}}" + lines + "\nAnswer:",
            "doc_to_choice": ["A", "B", "C", "D"],
        }
    return asked


# ---------------------------------------------------------------- one engine


def run_stock(folder: Path, task: str, device: str) -> dict[str, Any]:
    """Seconds of lm-eval's answers, and the answers."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    batch = STOCK_GENERATION_BATCH if task.startswith("generate") else STOCK_BATCH
    answering = HFLM(
        pretrained=str(folder / "model"), dtype="auto", batch_size=batch, device=device
    )
    spent = 0.0
    for method in ("loglikelihood", "generate_until"):
        answer = getattr(answering, method)

        def timed(requests: Any, answer: Any = answer) -> Any:
            nonlocal spent
            started = time.perf_counter()
            found = answer(requests)
            spent += time.perf_counter() - started
            return found

        setattr(answering, method, timed)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    loaded = manager.load([task])
    loaded["tasks"][task].set_fewshot_seed(1234)
    results = evaluate(lm=answering, task_dict=loaded, bootstrap_iters=0)
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    if task.startswith("generate"):
        answers: list[Any] = [sample["resps"][0][0] for sample in samples]
    else:
        answers = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples]
    return {"seconds": spent, "answers": answers}


def run_ours(folder: Path, task: str) -> dict[str, Any]:
    """Seconds of our answers, and the answers."""
    from eval.asking import ask
    from eval.cache import RequestCache
    from eval.questions import read_items
    from eval.subject import load_subject
    from eval.tasks import Task

    is_generated = task.startswith("generate")
    ours = Task(task, "requests", str(folder / f"{task}.jsonl"))
    if is_generated:
        ours = Task(
            task,
            "verified",
            str(folder / "gsm8k_test.jsonl"),
            verifier="gsm8k",
            examples_file=str(folder / "gsm8k_train.jsonl"),
            num_examples=4,
            stop=("Question:",),
            max_new_tokens=NEW_TOKENS,
        )
    examples = Path(ours.examples_file) if ours.examples_file else None
    items = read_items(ours, Path(ours.file), examples)
    subject = load_subject(str(folder / "model"), batch_tokens=8192, batch_size=64)
    with tempfile.TemporaryDirectory() as name:
        subject.cache = RequestCache(Path(name) / "benchmark.cache")
        started = time.perf_counter()
        rows = ask(subject, ours, items)
        seconds = time.perf_counter() - started
        subject.cache.close()
    if is_generated:
        return {"seconds": seconds, "answers": [row["answer"] for row in rows]}
    answers = [[option["logprob"] for option in row["options"]] for row in rows]
    return {"seconds": seconds, "answers": answers}


def peak_memory() -> int:
    """Of this process, in bytes. What getrusage tells counts the one that started it, too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def run_engine(engine: str, folder: Path, task: str, device: str) -> dict[str, Any]:
    """One measurement with its peak memory in bytes."""
    found = run_ours(folder, task) if engine == "ours" else run_stock(folder, task, device)
    memory = peak_memory()
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return found | {"memory_bytes": memory}


def largest_difference(ours: list[Any], theirs: list[Any]) -> str:
    """Of the log-probabilities; of texts, how many are the same."""
    if isinstance(ours[0], str):
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return f"{same} of {len(ours)} answers the same"
    pairs = [
        (a, b)
        for row, other in zip(ours, theirs, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    return f"largest difference {max(abs(a - b) for a, b in pairs):.0e} nats"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json")
    parser.add_argument("--gsm8k", type=Path, metavar="FOLDER", help="leave out: no generation")
    parser.add_argument("--docs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1, help="turns of each engine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=TASKS, action="append")
    parser.add_argument("--engine", choices=("ours", "stock"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.engine:  # one measurement, in a process of its own
        measured = run_engine(options.engine, options.folder, options.only[0], device)
        (options.folder / "found.json").write_text(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, options.tokenizer, options.docs, options.gsm8k)
        asked = [task for task in options.only or TASKS if options.gsm8k or "generate" not in task]
        print(f"{device}, {options.threads} threads, {options.docs} questions")
        for task in asked:
            if not task.startswith("generate"):
                write_requests(folder, task)
            compare(folder, task, options)


def compare(folder: Path, task: str, options: argparse.Namespace) -> None:
    """Measure both engines in turns and print."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for engine in ("stock", "ours"):
            command = [sys.executable, __file__, "--engine", engine, "--folder", str(folder)]
            command += ["--only", task, "--tokenizer", options.tokenizer]
            command += ["--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads((folder / "found.json").read_text())
            if engine not in best or found["seconds"] < best[engine]["seconds"]:
                best[engine] = found
    ours, stock = best["ours"], best["stock"]
    for engine, one in best.items():
        print(
            f"{task:<16}{engine:<7}{len(one['answers']) / one['seconds']:>8.1f} questions/s"
            f"{one['memory_bytes'] / 2**30:>7.2f} GiB"
        )
    print(
        f"{task:<16}ours is {stock['seconds'] / ours['seconds']:.1f} times as fast with "
        f"{ours['memory_bytes'] / stock['memory_bytes']:.2f} of the memory, "
        f"{largest_difference(ours['answers'], stock['answers'])}",
        flush=True,
    )


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # here, this file hides the package
    main()

"""Questions per second of our scorer and of lm-eval's own model, on the same tasks of lm-eval.

    python benchmarks/eval.py --tokenizer FILE [--docs 100] [--threads 2] [--only mc_5shot]

Each engine runs in a process of its own, so that its peak memory can be told, and answers the same
requests of a random OLMo-2 of 6.6M parameters: questions of everyday length made of random words,
scored without examples, after five, by letters after five, and answered with 64 new tokens after
four. Only the requests are timed, tokenising included; building prompts and judging are lm-eval's
in both. Printed as a table with ratios, and the largest difference of a log-probability.
"""

import argparse
import json
import random
import resource
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


# ---------------------------------------------------------------- what both are asked


def write_world(folder: Path, tokenizer: str, num_docs: int) -> None:
    """A model's folder and lm-eval's task files with their data."""
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
    (folder / "tasks").mkdir()
    for name in TASKS:
        content = yaml.safe_dump({"task": name} | definition(folder, name))
        (folder / "tasks" / f"{name}.yaml").write_text(content, encoding="utf-8")


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
        return asked | {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": NEW_TOKENS},
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


def load_engine(engine: str, model: str, device: str) -> Any:
    """The language model of lm-eval's interface that answers."""
    if engine == "stock":
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=model, dtype="auto", batch_size=STOCK_BATCH, device=device)
    from eval.lm_engine import ScoredModel
    from eval.subject import load_subject

    return ScoredModel(load_subject(model, batch_tokens=8192, batch_size=64))


def run_engine(engine: str, folder: Path, task: str, device: str) -> dict[str, Any]:
    """Seconds of its answers, peak memory, and the answers."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    answering = load_engine(engine, str(folder / "model"), device)
    spent = 0.0
    for method in ("loglikelihood", "generate_until"):
        answer = getattr(answering, method)

        def timed(requests: Any, answer: Any = answer) -> Any:
            nonlocal spent
            started = time.perf_counter()
            found = answer(requests)
            if device == "cuda":
                torch.cuda.synchronize()
            spent += time.perf_counter() - started
            return found

        setattr(answering, method, timed)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    loaded = manager.load([task])
    loaded["tasks"][task].set_fewshot_seed(1234)
    results = evaluate(lm=answering, task_dict=loaded, bootstrap_iters=0)
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    answers = [sample["filtered_resps"] for sample in samples]
    return {"seconds": spent, "memory_bytes": memory, "answers": answers}


def largest_difference(ours: list[Any], theirs: list[Any]) -> str:
    """Of the log-probabilities; of texts, how many are the same."""
    if isinstance(ours[0][0], str):
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return f"{same} of {len(ours)} answers the same"
    pairs = [
        (float(a[0]), float(b[0]))
        for row, other in zip(ours, theirs, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    return f"largest difference {max(abs(a - b) for a, b in pairs):.0e} nats"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json")
    parser.add_argument("--docs", type=int, default=100)
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
        write_world(folder, options.tokenizer, options.docs)
        print(f"{device}, {options.threads} threads, {options.docs} questions")
        for task in options.only or TASKS:
            found: dict[str, Any] = {}
            for engine in ("stock", "ours"):
                command = [sys.executable, __file__, "--engine", engine, "--folder", name]
                command += ["--only", task, "--tokenizer", options.tokenizer]
                command += ["--threads", str(options.threads)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                found[engine] = json.loads((folder / "found.json").read_text())
            ours, stock = found["ours"], found["stock"]
            for engine, one in found.items():
                print(
                    f"{task:<16}{engine:<7}{options.docs / one['seconds']:>8.1f} questions/s"
                    f"{one['memory_bytes'] / 2**30:>7.2f} GiB"
                )
            print(
                f"{task:<16}ours is {stock['seconds'] / ours['seconds']:.1f} times as fast with "
                f"{ours['memory_bytes'] / stock['memory_bytes']:.2f} of the memory, "
                f"{largest_difference(ours['answers'], stock['answers'])}"
            )


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # here, this file hides the package
    main()

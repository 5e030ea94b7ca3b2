"""Tokens per second of greedy generation: ours against transformers' ``generate``.

    python benchmarks/generate.py [--bf16] [--batch-sizes 1 16] [--new-tokens 128] [--threads 2]

A random OLMo-2, 256 wide, 6 layers, vocabulary 8,192, in the same weights, process and precision.
Each candidate answers the same sets of prompts in turns, and the best turn counts: whatever else
the machine does can only slow one down. Nothing ends early: there is no end token.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch

from olmo_base.model.generate import Generator
from olmo_base.model.hf_weights import export_hf
from olmo_base.model.transformer import ModelConfig, Transformer

SHAPE = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    eos_token_id=0,
    pad_token_id=1,
)
PROMPT_LENGTHS = (8, 32)  # of a set: its rows are cut to between half and all of it
NUM_TURNS = 3
Prompts = list[list[int]]
Candidate = Callable[[Prompts], Prompts]


def prompt_set(length: int, num_rows: int) -> Prompts:
    """Random prompts of different lengths up to ``length``, the first of all of it."""
    generator = torch.Generator().manual_seed(length)
    lengths = [max(1, length - row % (length // 2 + 1)) for row in range(num_rows)]
    return [torch.randint(2, 8192, (size,), generator=generator).tolist() for size in lengths]


def ours(model: Transformer, num_new: int) -> Candidate:
    """olmo_base.model.generate."""
    generator = Generator(model, eos_token_ids=[], max_length=SHAPE.max_position_embeddings)
    return lambda prompts: generator.generate(prompts, max_new_tokens=num_new)


def peer(folder: str, dtype: torch.dtype, num_new: int) -> Candidate:
    """Olmo2ForCausalLM.generate on left-padded prompts, with its own cache."""
    from transformers import Olmo2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = Olmo2ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def answer(prompts: Prompts) -> Prompts:
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[1] * (width - len(row)) + row for row in prompts])
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        out_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=num_new, do_sample=False
        )
        answers: Prompts = out_BT[:, width:].tolist()
        return answers

    return answer


def best_rates(
    candidates: dict[str, Candidate], sets: list[Prompts], num_new: int
) -> dict[str, float]:
    """Tokens a second of each candidate's best turn, the turns taken in rotation."""
    best = dict.fromkeys(candidates, 0.0)
    for answer in candidates.values():
        answer(sets[0])
    for _ in range(NUM_TURNS):
        for name, answer in candidates.items():
            started = time.perf_counter()
            count = sum(len(row) for prompts in sets for row in answer(prompts))
            best[name] = max(best[name], count / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Our generation against transformers'.")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    torch.manual_seed(0)
    model = Transformer(SHAPE).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, folder)
        candidates = {
            "olmo_base": ours(model, options.new_tokens),
            "transformers": peer(folder, dtype, options.new_tokens),
        }
    for size in options.batch_sizes:
        sets = [prompt_set(length, size) for length in PROMPT_LENGTHS]
        pairs = [
            (mine, theirs)
            for prompts in sets
            for mine, theirs in zip(
                *(answer(prompts) for answer in candidates.values()), strict=True
            )
        ]
        same = sum(mine == theirs for mine, theirs in pairs)
        rates = best_rates(candidates, sets, options.new_tokens)
        for name, rate in rates.items():
            print(
                f"batch {size:<3} {name:<14}{rate:>10,.0f} tokens/s   olmo_base / this "
                f"{rates['olmo_base'] / rate:5.2f}"
            )
        print(f"batch {size:<3} same answers: {same} of {len(pairs)}", flush=True)


if __name__ == "__main__":
    main()

"""How much memory a training step takes at its peak, from the architecture and the batches' sizes.

Weights, Adam's moments, and the larger of two moments: the backward pass begins, with all that the
layers keep, or ends, with all gradients. What a layer keeps is counted from its code, by the way
that it is computed (``logprobs.py``); ``benchmarks/memory.py`` shows it beside what is measured.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from olmo_base.model.attention import MAX_BLOCKED_LENGTH
from olmo_base.run.artefact import adapter_base, resolve_model
from open_instruct.adapters import (
    AdapterConfig,
    add_adapter,
    add_token_rows,
    new_adapter_like,
)
from open_instruct.batches import MicroBatchSize
from open_instruct.causal_lm import ModelConfig, load_config
from open_instruct.encode import add_new_tokens, load_chat_tokenizer
from open_instruct.logprobs import AT_LABELS, EVERYWHERE, MAX_LOGITS, NATIVE, PACKED

FLOAT_BYTES = 4
KERNELS_BYTES = 40 * 10**6  # what torch's kernels take when they first run
# C's allocator gives little of what was freed to a micro-batch of another size. Measured.
UNLIKE_SIZES_NATIVE, UNLIKE_SIZES = 1.25, 1.85
REWARDS = "the last token"  # beside the ways to log-probabilities: one number for a row
CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, in numbers: all, those trained, and those kept in few bits."""

    all: int
    trained: int
    quantised: int = 0
    bits: int = 32

    @property
    def weight_bytes(self) -> int:
        """What the weights take; quantised ones bring a float32 scale for each 64."""
        few = self.quantised * (self.bits + 0.5) / 8
        return FLOAT_BYTES * (self.all - self.quantised) + round(few)


def count_parameters(
    config: ModelConfig, adapter: AdapterConfig | None = None, architecture: Any | None = None
) -> Sizes:
    """Sizes of the model, from its architecture alone; None: the one in its folder."""
    adapter = adapter or AdapterConfig()
    folder = resolve_model(config.model_name_or_path) if architecture is None else None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture or load_config(config), trust_remote_code=config.trust_remote_code
        )
        if folder is None:
            first = model.config.get_text_config().vocab_size
            new_ids = [first + place for place in range(len(config.additional_special_tokens))]
        else:
            tokenizer = load_chat_tokenizer(folder)
            new_ids = add_new_tokens(tokenizer, config.additional_special_tokens)
        if new_ids:
            add_token_rows(model, new_ids)
        number = sum(weight.numel() for weight in model.parameters())
        if not adapter.use_peft:
            return Sizes(number, number)
        head = model.get_output_embeddings()
        inner = [
            module
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        ]
        linear = sum(module.weight.numel() for module in inner)
        is_usual = adapter.lora_target_modules is None and not adapter.use_dora and not new_ids
        if folder is None and is_usual:  # peft takes seconds to say the same of a large model
            widths = sum(module.in_features + module.out_features for module in inner)
            trained = adapter.rank * widths
        else:
            if folder is not None and adapter_base(folder) is not None:
                adapted = new_adapter_like(model, folder)
            else:
                name = config.model_name_or_path
                adapted = add_adapter(model, adapter, name, seed=0, new_ids=new_ids)
            trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    bits = 4 if adapter.load_in_4bit else 8
    return Sizes(number + trained, trained, linear if adapter.is_quantised else 0, bits)


def memory_at_hand(device: torch.device) -> int:
    """Bytes of the GPU; of the machine for each of its ranks, as far as this container may go."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            limits.append(int(file.read_text()))
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def training_memory(
    model_config: Any,
    sizes: Sizes,
    micro_batches: Sequence[MicroBatchSize],
    *,
    way: str,
    gradient_checkpointing: bool,
    needs_distribution: bool = False,
    adapter: AdapterConfig | None = None,
    device: str = "cpu",
) -> int:
    """Bytes at the peak of a float32 step, beside the program itself.

    ``way`` is one of those to the labels' logits, or REWARDS, which makes none.
    ``needs_distribution``: the loss needs more than the labels' log-probabilities.
    """
    text_config = model_config.get_text_config()
    width, layers = text_config.hidden_size, text_config.num_hidden_layers
    inner = getattr(text_config, "intermediate_size", None) or 4 * width
    heads, vocab_size = text_config.num_attention_heads, text_config.vocab_size
    is_native = way in (NATIVE, PACKED)
    is_cut = len(micro_batches) > len({size.step for size in micro_batches})
    if is_native:
        kept, passing = 10 * width + (2 if device == "cpu" else 4) * inner, 4 * width + 3 * inner
    elif sizes.trained == sizes.all:
        kept, passing = 15 * width + 4 * inner, 4 * width + 3 * inner
    else:
        kept, passing = 11 * width + 4 * inner, 4 * width + 3 * inner
        if adapter is None or adapter.lora_dropout != 0:  # its noise and what it leaves, each
            kept += 9 * width + inner
    ends = 4 * width  # embeddings, the last norm, the states at the labels
    freed = 1.05
    if device == "cpu" and is_cut:
        freed = UNLIKE_SIZES_NATIVE if is_native else UNLIKE_SIZES
    is_blocked = is_native and device == "cpu"
    floats = 0
    for size in micro_batches:
        layer = size.positions * kept
        if is_blocked and size.longest <= MAX_BLOCKED_LENGTH:
            layer += heads * (size.seen // 2 + 32 * size.positions)  # probabilities
        logits = _logits(size, vocab_size, way, needs_distribution)
        passing_by = size.positions * passing
        if gradient_checkpointing:
            begin = layers * size.positions * width + max(logits, layer + passing_by)
        else:
            begin = layers * layer + max(logits, passing_by)
        gradients_before = sizes.trained if is_cut else 0  # of the micro-batch before
        begin, end = (
            round(freed * (size.positions * ends + moment))
            for moment in (begin, layer + passing_by)
        )
        floats = max(floats, gradients_before + begin, sizes.trained + end)
    floats += 2 * sizes.trained
    return sizes.weight_bytes + FLOAT_BYTES * floats + KERNELS_BYTES


def _logits(size: MicroBatchSize, vocab_size: int, way: str, needs_distribution: bool) -> int:
    """Floats of the size of logits that are held at once.

    The head at the labels holds them once, its gradient in their place, and works in pieces above
    MAX_LOGITS. Whoever needs more of them than that holds log-softmax and gradient beside them.
    """
    if way == REWARDS:
        return 0
    number = size.labels * vocab_size
    if way == EVERYWHERE:
        return 2 * size.positions * vocab_size + 2 * number
    if way == AT_LABELS:
        return 3 * number
    return min(number, MAX_LOGITS) * (3 if needs_distribution else 1)

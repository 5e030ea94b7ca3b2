"""How much memory a training step takes at its peak, from the architecture and the batches' sizes.

Weights, Adam's moments, and the larger of two moments: the backward pass begins, with all that the
layers keep, or ends, with all gradients. What a layer keeps is counted from its code, by the way
that it is computed (``logprobs.py``); ``benchmarks/memory.py`` shows it beside what is measured.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from olmo_base.model.attention import MAX_BLOCKED_LENGTH
from olmo_base.run.artefact import adapter_base, resolve_model
from olmo_base.run.launch import Launch
from open_instruct.adapters import (
    AdapterConfig,
    add_adapter,
    add_token_rows,
    new_adapter_like,
)
from open_instruct.batches import MicroBatchSize
from open_instruct.causal_lm import ModelConfig, load_config
from open_instruct.encode import add_new_tokens, load_chat_tokenizer
from open_instruct.logprobs import (
    AT_LABELS,
    EVERYWHERE,
    MAX_LOGITS,
    NATIVE,
    PACKED,
    PACKED_LABELS,
    PACKING_WAYS,
)

FLOAT_BYTES, HALF_BYTES = 4, 2
# How much of what is freed a CPU's allocator keeps beside what is in use. Measured
# (benchmarks/memory.py): it gives little of it to a micro-batch of another size, nor, under
# adapters, to the many tensors of other sizes that they make.
EVEN = 1.05  # all rows padded to one length, or on a GPU
TIDY, TIDY_HALVES = 1.13, 1.2  # native layers over rows end to end
LOOSE = 1.24  # transformers' layers over them, and losses that ask for the whole distribution
AGAIN, HALVES_AGAIN, LOOSE_AGAIN = 1.43, 1.85, 2.0  # the same, computed again
UNLIKE_SIZES = 1.6
ADAPTED = 1.6
# An adapter's layers, computed again, take this over the fourth root of their number times what
# they would keep: the gaps that their many tensors leave grow with them. Measured to 16 layers.
ADAPTED_AGAIN = 1.5
KERNELS_BYTES = 30 * 2**20  # what torch's kernels take while they run
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
    norms_queries: bool = True  # queries and keys, as OLMo-2 and Qwen3 do and Llama does not

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
        norms_queries = any(name.endswith("q_norm") for name, _ in model.named_modules())
        if not adapter.use_peft:
            return Sizes(number, number, norms_queries=norms_queries)
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
    quantised = linear if adapter.is_quantised else 0
    return Sizes(number + trained, trained, quantised, bits, norms_queries)


def memory_at_hand(device: torch.device) -> int:
    """Bytes of the GPU; of the machine for each of its ranks, as far as this container may go."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            limits.append(int(file.read_text()))
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Layer(NamedTuple):
    """Bytes of one layer for each position that it computes."""

    kept: float  # from its forward pass to its backward pass
    passing: float  # while its backward pass lasts


def layer_bytes(
    text_config: Any,
    sizes: Sizes,
    *,
    way: str,
    adapter: AdapterConfig | None,
    bf16: bool,
    device: str,
) -> Layer:
    """What autograd keeps of a layer, counted from its code; attention's probabilities not.

    Under autocast to bfloat16 norms and the residual stream stay in float32, and each linear map
    keeps its input in bfloat16.
    """
    width = text_config.hidden_size
    inner = getattr(text_config, "intermediate_size", None) or 4 * width
    product_bytes = HALF_BYTES if bf16 else FLOAT_BYTES
    normed = 2 if sizes.norms_queries else 0
    if way in (NATIVE, PACKED):
        kept = width * ((20 + 4 * normed) if bf16 else 4 * (8 + normed))
        kept += product_bytes * inner * (2 if device == "cpu" and not bf16 else 4)
    elif sizes.trained == sizes.all:
        kept = width * ((34 + 8 * normed) if bf16 else 4 * (10 + 2 * normed))
        kept += product_bytes * inner * 4
    else:
        kept = width * ((28 + 4 * normed) if bf16 else 4 * (8 + normed))
        kept += product_bytes * inner * 4
        adapter = adapter or AdapterConfig(use_peft=True)
        kept += product_bytes * 7 * adapter.rank
        if adapter.lora_dropout != 0:  # its noise and what it leaves, each
            kept += (24 if bf16 else 40) * width + product_bytes * 2 * inner // (1 if bf16 else 2)
    return Layer(kept, FLOAT_BYTES * 4 * width + product_bytes * 2 * inner)


class Held(NamedTuple):
    """Bytes of what is there whatever the batch."""

    weights: int
    gradients: int
    moments: int
    gathered: int = 0  # of divided weights: what is whole while it is computed with


def held_by_each(text_config: Any, sizes: Sizes, launch: Launch | None) -> Held:
    """What each process holds of the model.

    Divided (FSDP2, ZeRO-3), a layer is whole while it is computed, the next one while it is
    fetched, and embedding and head through the step; a layer's gradient is whole until it is
    exchanged. Whole copies (DDP) hold gradients once more, in the buckets that they are sent in.
    """
    gradients = FLOAT_BYTES * sizes.trained
    if launch is None or launch.num_processes == 1:
        return Held(sizes.weight_bytes, gradients, 2 * gradients)
    if not launch.divides:
        return Held(sizes.weight_bytes, 2 * gradients, 2 * gradients)
    ends = text_config.vocab_size * text_config.hidden_size
    if not text_config.tie_word_embeddings:
        ends *= 2
    layers = text_config.num_hidden_layers
    layer = (sizes.all - ends) / layers
    whole = 2 if launch.releases else layers
    gathered = ends + whole * layer + layer * sizes.trained / sizes.all
    parts = launch.shards
    return Held(
        weights=sizes.weight_bytes // parts,
        gradients=gradients // parts,
        moments=2 * gradients // parts,
        gathered=round(FLOAT_BYTES * gathered),
    )


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
    bf16: bool = False,
    launch: Launch | None = None,
) -> int:
    """Bytes at the peak of a step, beside the program itself; weights are kept in float32.

    With ``launch`` those of each process.

    ``way`` is one of those to the labels' logits, or REWARDS, which makes none.
    ``needs_distribution``: the loss needs more than the labels' log-probabilities. ``bf16``: it is
    computed under autocast.
    """
    keeps, recomputes = (
        _training_memory(
            model_config,
            sizes,
            micro_batches,
            way=way,
            recomputes=recomputes,
            needs_distribution=needs_distribution,
            adapter=adapter,
            device=device,
            bf16=bf16,
            launch=launch,
        )
        for recomputes in (False, True)
    )
    return min(keeps, recomputes) if gradient_checkpointing else keeps


def _training_memory(
    model_config: Any,
    sizes: Sizes,
    micro_batches: Sequence[MicroBatchSize],
    *,
    way: str,
    recomputes: bool,
    needs_distribution: bool,
    adapter: AdapterConfig | None,
    device: str,
    bf16: bool,
    launch: Launch | None,
) -> int:
    text_config = model_config.get_text_config()
    width, layers = text_config.hidden_size, text_config.num_hidden_layers
    heads, vocab_size = text_config.num_attention_heads, text_config.vocab_size
    is_native = way in (NATIVE, PACKED)
    is_cut = len(micro_batches) > len({size.step for size in micro_batches})
    kept, passing = layer_bytes(
        text_config, sizes, way=way, adapter=adapter, bf16=bf16, device=device
    )
    # Of the last native layer, what comes after attention is computed at the labels only.
    at_labels = max(0.0, kept - FLOAT_BYTES * 6 * width)
    ends = 4 * width * FLOAT_BYTES  # embeddings, the last norm, the states at the labels
    freed = EVEN
    if device == "cpu":
        freed = _kept_when_freed(
            is_native=is_native,
            packs=way in PACKING_WAYS,
            is_adapted=sizes.trained < sizes.all,
            is_cut=is_cut,
            bf16=bf16,
            recomputes=recomputes,
            needs_distribution=needs_distribution,
            num_layers=layers,
        )
    leaves_gaps = device == "cpu" and sizes.trained < sizes.all
    is_blocked = device == "cpu" and (is_native or way in PACKING_WAYS)
    if way == REWARDS:
        sizes = _without_head(text_config, sizes)
    held = held_by_each(text_config, sizes, launch)
    casts = 0
    if bf16:  # of the weights of linear maps, kept for the gradient of what they were multiplied by
        untied = 0 if text_config.tie_word_embeddings else vocab_size * width
        casts = HALF_BYTES * (sizes.all - sizes.quantised - untied)
    most = 0.0
    for size in micro_batches:
        layer = size.positions * kept
        if is_blocked and size.longest <= MAX_BLOCKED_LENGTH:
            probabilities = heads * (size.seen // 2 + 32 * size.positions)
            layer += (HALF_BYTES if bf16 else FLOAT_BYTES) * probabilities
        last = layer
        logits = FLOAT_BYTES * _logits(size, vocab_size, way, needs_distribution)
        logits *= 2 if bf16 else 1  # made in bfloat16, and their gradient again
        passing_by = size.positions * passing
        if way == PACKED:
            last = layer - (size.positions - size.labels) * at_labels
        if recomputes and not leaves_gaps:
            inputs = layers * size.positions * width * FLOAT_BYTES
            begin = inputs + max(logits + casts, layer + passing_by)
        else:
            begin = (layers - 1) * layer + last + casts + max(logits, passing_by)
        begin, end = (
            freed * (size.positions * ends + moment) for moment in (begin, layer + passing_by)
        )
        most = max(most, (held.gradients if is_cut else 0) + begin, held.gradients + end)
    return held.weights + held.moments + held.gathered + round(most) + KERNELS_BYTES


def _without_head(text_config: Any, sizes: Sizes) -> Sizes:
    """Of a reward model, whose head is one row and not one for each token."""
    if text_config.tie_word_embeddings:
        return sizes
    head = text_config.vocab_size * text_config.hidden_size
    is_whole = sizes.trained == sizes.all
    return replace(
        sizes, all=sizes.all - head, trained=sizes.trained - head if is_whole else sizes.trained
    )


def _kept_when_freed(
    *,
    is_native: bool,
    packs: bool,
    is_adapted: bool,
    is_cut: bool,
    bf16: bool,
    recomputes: bool,
    needs_distribution: bool,
    num_layers: int,
) -> float:
    if is_adapted and recomputes:
        return ADAPTED_AGAIN / num_layers**0.25
    if is_cut:
        return UNLIKE_SIZES
    if is_adapted:
        return ADAPTED
    if recomputes:
        return LOOSE_AGAIN if not is_native else HALVES_AGAIN if bf16 else AGAIN
    if not packs:
        return EVEN
    if not is_native or needs_distribution:
        return LOOSE
    return TIDY_HALVES if bf16 else TIDY


def _logits(size: MicroBatchSize, vocab_size: int, way: str, needs_distribution: bool) -> int:
    """Floats of the size of logits that are held at once.

    The head at the labels holds them once, its gradient in their place, and works in pieces above
    MAX_LOGITS. Whoever needs more of them than that holds what that is made of beside them.
    """
    if way == REWARDS:
        return 0
    number = size.labels * vocab_size
    if way == EVERYWHERE:
        return 2 * size.positions * vocab_size + 2 * number
    if way in (AT_LABELS, PACKED_LABELS):
        return 3 * number
    return min(number, MAX_LOGITS) * (5 if needs_distribution else 1)

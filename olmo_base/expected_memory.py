"""How much memory a process of a pretraining run takes at its peak, from shape and division."""

from dataclasses import dataclass

from olmo_base.losses import MAX_LOGITS
from olmo_base.model.transformer import ModelConfig, num_parameters
from olmo_base.parallel import ParallelConfig, divided

PROCESS_BYTES = 320_000_000  # Python with torch, before any tensor


@dataclass(frozen=True)
class Division:
    """How a run is cut over processes: copies x shards x context x tensor of them."""

    copies: int = 1
    shards: int = 1  # of the data; weights are divided over shards x context, unless they are whole
    context: int = 1
    tensor: int = 1
    divides_weights: bool = False

    @property
    def num_data(self) -> int:
        """Processes that read different sequences."""
        return self.copies * self.shards

    @property
    def weight_parts(self) -> int:
        """Processes that hold a copy of the weights together, those of a layer not counted."""
        return self.shards * self.context if self.divides_weights else 1


def division_of(config: ParallelConfig, num_processes: int, of_node: int = 8) -> Division:
    """What ``config`` means for so many processes, ``of_node`` of them on a machine.

    Errors: UserError if they cannot be divided so.
    """
    copies, shards = divided(config, num_processes, min(of_node, num_processes))
    is_sharded = config.data_parallel != "ddp" and shards * config.context_parallel > 1
    context, tensor = config.context_parallel, config.tensor_parallel
    return Division(copies, shards, context, tensor, is_sharded)


def weights_bytes(
    config: ModelConfig, division: Division, *, bf16: bool, checkpointing: bool
) -> int:
    """Of weights, gradients, Adam's moments, and what of them is whole while it is computed with.

    16 bytes a parameter, divided; in bf16 2 more for the copy that products read, which is kept
    from forward to backward pass unless layers are computed again. Of divided weights a layer and
    the next are gathered, in bf16 where products are, and the layer's gradient until it is
    exchanged; embedding and head are whole in fp32 through the step, their gradients at its end.
    """
    head = config.vocab_size * config.hidden_size
    ends = head * (1 if config.tie_word_embeddings else 2)
    layer = (num_parameters(config) - ends) / config.num_hidden_layers / division.tensor
    number = ends + config.num_hidden_layers * layer
    held = 16 * number / division.weight_parts
    if division.weight_parts > 1:
        held += 4 * 2 * ends + ((2 if bf16 else 4) * 2 + 4) * layer + (2 * head if bf16 else 0)
    elif bf16:
        held += 2 * (ends + 2 * layer if checkpointing else number)
    return round(held)


def expected_memory_bytes(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    *,
    bf16: bool,
    checkpointing: bool,
    device: str = "cpu",
    division: Division | None = None,
) -> int:
    """Peak memory of a training process.

    ``weights_bytes``; what backward needs of each layer: per token, 10 tensors of the width in the
    product's dtype and 2 in fp32, 4 of the feed-forward's width, and on a CPU half a row of
    attention probabilities per head; 2 layers' worth in fp32 that come and go; Python with torch.
    Of the 10, 6 lie inside attention and are divided with it. On a CPU, one process was 0.9 to 1.15
    of the measured peak, for 3 to 67 M parameters.
    """
    division = division or Division()
    width, num_layers = config.hidden_size, config.num_hidden_layers
    parts = division.tensor

    def layer(itemsize: int) -> float:
        attention = 0.0
        if device == "cpu":
            attention = config.num_attention_heads * max_length * itemsize / 2
        inside = 6 * width * itemsize + 4 * config.intermediate_size * itemsize + attention
        return width * (4 * itemsize + 8) + inside / parts

    kept = num_layers * layer(2 if bf16 else 4)
    if checkpointing:  # the inputs of all layers, and one layer recomputed
        kept = num_layers * width * 4 + layer(4)
    tokens = batch_size * max_length / division.context
    weights = weights_bytes(config, division, bf16=bf16, checkpointing=checkpointing)
    logits = 3 * 4 * min(MAX_LOGITS[device], tokens / parts * config.vocab_size)
    return round(PROCESS_BYTES + weights + tokens * (kept + 2 * layer(4)) + logits)

"""The OLMo-2 language model (arXiv:2501.00656): ids in, hidden states and logits out.

B batch, T positions, D width, V vocabulary.

The norms stand on the outputs of attention and feed-forward, inside the residual branch, and not
before them: h = x + norm(attention(x)), out = h + norm(feed_forward(h)).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olmo_base.model.attention import Attention, KeyValueCache
from olmo_base.model.feed_forward import Embedding, FeedForward, Linear, RMSNorm
from olmo_base.model.rope import RotaryTable
from olmo_base.run.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of an OLMo-2 model, under the names that its config.json carries.

    Errors: UserError naming the key, its value and what it must be.
    """

    vocab_size: int  # rows of the embedding, padding rows included
    hidden_size: int
    intermediate_size: int  # of gate and of up, each
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None = None
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} does not divide into num_attention_heads "
                f"{self.num_attention_heads} equal heads. Choose a multiple of "
                f"{2 * self.num_attention_heads}."
            )
        if self.head_dim % 2:
            raise UserError(
                f"hidden_size {self.hidden_size} over num_attention_heads "
                f"{self.num_attention_heads} gives heads of {self.head_dim} channels; rotary "
                "positions turn pairs of channels, so the number must be even."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}: each key/value head serves "
                "the same number of query heads."
            )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value!r}; it must be a number above 0.")
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise UserError(
                    f"{name} is {value}; the ids of a vocabulary of {self.vocab_size} "
                    f"are 0 to {self.vocab_size - 1}."
                )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads


def num_parameters(config: ModelConfig) -> int:
    """Every weight, counted once: tied embeddings count once too."""
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    norms_per_layer = 3 * width + kv_width  # of attention, feed-forward, query; and of key
    num_embedding = config.vocab_size * width
    num_heads = 0 if config.tie_word_embeddings else num_embedding
    num_layers = config.num_hidden_layers
    return (
        num_embedding
        + num_heads
        + num_layers * (_matmul_weights_per_layer(config) + norms_per_layer)
        + width
    )


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of one training token, forward and backward.

    6 N + 12 L H h T as in PaLM (arXiv:2204.02311, appendix B): N counts the weights that take part
    in a matrix product, the language-model head among them and the embedding look-up not. The
    masked half of attention is counted too, as is usual.
    """
    num_weights = (
        config.num_hidden_layers * _matmul_weights_per_layer(config)
        + config.vocab_size * config.hidden_size
    )
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    return 6.0 * num_weights + attention


def _matmul_weights_per_layer(config: ModelConfig) -> int:
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    return 2 * width * width + 2 * width * kv_width + 3 * width * config.intermediate_size


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normed on its way into the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
        )
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        may_attend: Tensor | None,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        """BTD to BTD."""
        mixed_BTD = self.attention(x_BTD, rotation, may_attend, cache, layer)
        x_BTD = x_BTD + self.attention_norm(mixed_BTD)
        return x_BTD + self.feed_forward_norm(self.feed_forward(x_BTD))


class Transformer(nn.Module):
    """The model without its loss. ``model.logits(model(ids_BT))`` are the next-token logits."""

    def __init__(self, config: ModelConfig) -> None:
        """Weights are drawn from torch's global generator; under torch.device("meta") none are."""
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.rotary_table = RotaryTable(config.head_dim, config.rope_theta)
        self.gradient_checkpointing = False  # recompute each layer in the backward pass

    def forward(
        self,
        ids_BT: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, BTD.

        ``document_ids_BT`` numbers the documents packed into a row; a position then sees only its
        own document (RoPE is relative, so positions need not start anew). ``cache`` continues what
        it holds. Errors: UserError if there are more positions than the model was made for.
        """
        rotation, may_attend = self._positions_and_mask(ids_BT, document_ids_BT, cache)
        x_BTD = self.embed_tokens(ids_BT)
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x_BTD = checkpoint(
                    layer, x_BTD, rotation, may_attend, None, index, use_reentrant=False
                )
            else:
                x_BTD = layer(x_BTD, rotation, may_attend, cache, index)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        return self.norm(x_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Next-token logits, BTV, of hidden states of any leading shape."""
        return F.linear(hidden_BTD, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """The language-model head, VD: the embedding itself if the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are kept in."""
        return self.embed_tokens.weight.dtype

    def new_cache(self, padding_B: list[int], *, capacity: int) -> KeyValueCache:
        """An empty cache for rows with so many padding positions before them."""
        return KeyValueCache(
            self.config.num_hidden_layers,
            self.config.num_key_value_heads,
            self.config.head_dim,
            padding_B,
            capacity=capacity,
            device=self.device,
            dtype=self.dtype,
        )

    def _positions_and_mask(
        self, ids_BT: Tensor, document_ids_BT: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        num_positions = ids_BT.shape[1]
        if cache is not None:
            assert document_ids_BT is None, "a cache holds one document per row"
            cache.reserve(num_positions)
            self._check_length(cache.longest_row + num_positions)
            cos_Sh, sin_Sh = self.rotary_table(cache.length + num_positions, ids_BT.device)
            positions = cache.positions(num_positions)
            may_attend = cache.may_attend(num_positions)
            cos, sin = cos_Sh[positions], sin_Sh[positions]
            if positions.ndim == 2:  # rows at different positions: B1Th beside BHTh
                cos, sin = cos[:, None], sin[:, None]
            return (cos, sin), may_attend
        self._check_length(num_positions)
        cos_Sh, sin_Sh = self.rotary_table(num_positions, ids_BT.device)
        rotation = cos_Sh[:num_positions], sin_Sh[:num_positions]
        if document_ids_BT is None:
            return rotation, None
        is_same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
        return rotation, is_same_BTT.tril()[:, None]

    def _check_length(self, num_positions: int) -> None:
        if num_positions > self.config.max_position_embeddings:
            raise UserError(
                f"A row has {num_positions} tokens; this model was made for at most "
                f"{self.config.max_position_embeddings} (max_position_embeddings). Shorten the row."
            )

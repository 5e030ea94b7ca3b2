"""The OLMo language models, all three generations: ids in, hidden states and logits out.

B batch, T positions, D width, V vocabulary.

OLMo-1 (arXiv:2402.00838) norms what goes into attention and feed-forward, without weights:
h = x + attention(norm(x)), out = h + feed_forward(norm(h)). OLMo-2 (arXiv:2501.00656) norms what
comes out of them, inside the residual branch: h = x + norm(attention(x)), out = h +
norm(feed_forward(h)), and norms queries and keys too. OLMo-3 is OLMo-2 of whose layers three of
four see no further back than a window.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from olmo_base.model.attention import (
    Attention,
    KeyValueCache,
    SharedPrefix,
    Sight,
    Tree,
    window_mask,
)
from olmo_base.model.context import SplitContext
from olmo_base.model.feed_forward import (
    INIT_STD,
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
)
from olmo_base.model.packing import Branches, Packing
from olmo_base.model.rope import RotaryTable, Yarn
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import setting

GENERATIONS = {"olmo": "OLMo-1", "olmo2": "OLMo-2", "olmo3": "OLMo-3"}
RMS_NORM_EPS = 1e-6
FULL, SLIDING = "full_attention", "sliding_attention"


# What a layer computes again in the backward pass instead of keeping it: nothing, all but what its
# matrix products and attention gave, or all. True is "full".
Recomputation = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of an OLMo model, under the names that its config.json carries.

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
    rms_norm_eps: float = RMS_NORM_EPS
    tie_word_embeddings: bool = False
    model_type: str = "olmo2"  # the generation, one of GENERATIONS
    clip_qkv: float | None = None  # OLMo-1: queries, keys and values are cut at plus-minus this
    sliding_window: int | None = None  # OLMo-3: tokens that a windowed layer sees, itself included
    layer_types: tuple[str, ...] | None = None  # OLMo-3: which layers have it; None as released
    rope_scaling: Yarn | None = None  # OLMo-3: of the layers that see all

    def __post_init__(self) -> None:
        if self.model_type not in GENERATIONS:
            known = ", ".join(GENERATIONS)
            raise UserError(f"model_type is {self.model_type!r}; the generations are {known}.")
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
        if self.model_type == "olmo":
            self._check_olmo1()
        elif self.clip_qkv is not None:
            raise UserError(
                f"clip_qkv is {self.clip_qkv}, but only OLMo-1 has it, and model_type is "
                f"{self.model_type}. Leave it out."
            )
        if self.model_type == "olmo3":
            self._check_olmo3()
        else:
            for name in ("sliding_window", "layer_types", "rope_scaling"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} is given, but only OLMo-3 has it, and model_type is "
                        f"{self.model_type}. Leave it out."
                    )

    def _check_olmo1(self) -> None:
        if self.clip_qkv is not None and not (math.isfinite(self.clip_qkv) and self.clip_qkv > 0):
            raise UserError(f"clip_qkv is {self.clip_qkv!r}; it must be a number above 0.")
        if self.rms_norm_eps != RMS_NORM_EPS:
            raise UserError(
                f"rms_norm_eps is {self.rms_norm_eps}, but OLMo-1 has a LayerNorm of a fixed eps "
                "and no RMSNorm. Leave it out."
            )

    def _check_olmo3(self) -> None:
        window, types = self.sliding_window, self.layer_types
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise UserError(f"sliding_window is {window!r}; it must be a whole number, at least 1.")
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise UserError(f"rope_theta is {self.rope_theta!r}; with YaRN it must be above 1.")
        if types is None:
            return
        if len(types) != self.num_hidden_layers:
            raise UserError(
                f"layer_types names {len(types)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}."
            )
        if wrong := sorted(set(types) - {FULL, SLIDING}):
            raise UserError(f"layer_types holds {wrong[0]!r}; it must be {FULL} or {SLIDING}.")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def norms_inputs(self) -> bool:
        """Whether norms stand before attention and feed-forward; if not, after them."""
        return self.model_type == "olmo"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer sees, itself included; None for all before it."""
        types = self.layer_types or released_layer_types(self.num_hidden_layers)
        return tuple(
            self.sliding_window if kind == SLIDING and self.model_type == "olmo3" else None
            for kind in types
        )


def released_layer_types(num_layers: int) -> tuple[str, ...]:
    """OLMo-3's pattern: every fourth layer sees all, and so does the last."""
    return tuple(
        FULL if index % 4 == 3 or index == num_layers - 1 else SLIDING
        for index in range(num_layers)
    )


def num_parameters(config: ModelConfig) -> int:
    """Every weight, counted once: tied embeddings count once too."""
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    norms_per_layer = 3 * width + kv_width  # of attention, feed-forward, query; and of key
    final_norm = width
    if config.model_type == "olmo":
        norms_per_layer = final_norm = 0
    num_embedding = config.vocab_size * width
    num_heads = 0 if config.tie_word_embeddings else num_embedding
    num_layers = config.num_hidden_layers
    return (
        num_embedding
        + num_heads
        + num_layers * (_matmul_weights_per_layer(config) + norms_per_layer)
        + final_norm
    )


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of one training token, forward and backward.

    6 N + 12 L H h T as in PaLM (arXiv:2204.02311, appendix B): N counts the weights that take part
    in a matrix product, the language-model head among them and the embedding look-up not. The
    masked half of attention is counted too, as is usual; of a windowed layer, the window.
    """
    num_weights = (
        config.num_hidden_layers * _matmul_weights_per_layer(config)
        + config.vocab_size * config.hidden_size
    )
    num_seen = sum(min(window or sequence_length, sequence_length) for window in config.windows)
    attention = 12 * config.hidden_size * num_seen
    return 6.0 * num_weights + attention


def _matmul_weights_per_layer(config: ModelConfig) -> int:
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    return 2 * width * width + 2 * width * kv_width + 3 * width * config.intermediate_size


@dataclass(frozen=True)
class EndsInit:
    """Standard deviations that embedding and head start with; None: that of other matrices."""

    embedding_init_std: float | None = setting(
        None, above=0, help="null: that of the other matrices, 0.02 from OLMo-2 on"
    )
    head_init_std: float | None = setting(None, above=0, help="of the output head, likewise")


class InitStd(NamedTuple):
    """Standard deviations that a layer's matrices start with."""

    inputs: float  # of what reads the residual stream
    attention_out: float
    feed_forward_out: float


def init_std(config: ModelConfig, layer: int) -> InitStd:
    """OLMo-1 scales by width and depth (its "mitchell" scheme), later ones use one number."""
    if config.model_type != "olmo":
        return InitStd(INIT_STD, INIT_STD, INIT_STD)
    return InitStd(
        config.hidden_size**-0.5,
        (2 * config.hidden_size * (layer + 1)) ** -0.5,
        (2 * config.intermediate_size * (layer + 1)) ** -0.5,
    )


def new_norm(config: ModelConfig) -> nn.Module:
    """The generation's norm of the residual stream's width."""
    if config.model_type == "olmo":
        return LayerNorm()
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normed on its way in (OLMo-1) or out."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        std = init_std(config, layer)
        self.norms_inputs = config.norms_inputs
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            qk_norm_eps=None if config.model_type == "olmo" else config.rms_norm_eps,
            clip_qkv=config.clip_qkv,
            init_std=std.inputs,
            out_init_std=std.attention_out,
        )
        self.attention_norm = new_norm(config)
        self.feed_forward = FeedForward(
            config.hidden_size, config.intermediate_size, std.inputs, std.feed_forward_out
        )
        self.feed_forward_norm = new_norm(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        may_attend: Tensor | None,
        cache: KeyValueCache | SharedPrefix | SplitContext | None,
        layer: int,
    ) -> Tensor:
        """BTD to BTD."""
        if self.norms_inputs:
            normed_BTD = self.attention_norm(x_BTD)
            x_BTD = x_BTD + self.attention(normed_BTD, rotation, may_attend, cache, layer)
            return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        mixed_BTD = self.attention(x_BTD, rotation, may_attend, cache, layer)
        x_BTD = x_BTD + self.attention_norm(mixed_BTD)
        return x_BTD + self.feed_forward_norm(self.feed_forward(x_BTD))

    def packed(
        self,
        x_ND: Tensor,
        packing: Packing,
        sights: list[Sight],
        wanted_L: Tensor | None = None,
    ) -> Tensor:
        """ND to ND: rows laid end to end. LD with the L positions that alone are ``wanted``."""
        normed_ND = self.attention_norm(x_ND) if self.norms_inputs else x_ND
        mixed = self.attention.packed(normed_ND, packing, sights, wanted_L)
        x = x_ND if wanted_L is None else x_ND.index_select(0, wanted_L)
        if self.norms_inputs:
            x = x + mixed
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = x + self.attention_norm(mixed)
        return x + self.feed_forward_norm(self.feed_forward(x))


KEPT_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_products() -> Any:
    def policy(
        ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        is_kept = op in KEPT_PRODUCTS
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Transformer(nn.Module):
    """The model without its loss. ``model.logits(model(ids_BT))`` are the next-token logits."""

    def __init__(self, config: ModelConfig, ends: EndsInit = EndsInit()) -> None:
        """Weights are drawn from torch's global generator; under torch.device("meta") none are."""
        super().__init__()
        self.config = config
        std = init_std(config, 0).inputs
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, ends.embedding_init_std or std
        )
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = new_norm(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, ends.head_init_std or std)
        )
        self.windows = config.windows
        self.rotary_tables = {
            window: RotaryTable(
                config.head_dim,
                config.rope_theta,
                config.rope_scaling if window is None else None,
            )
            for window in self.windows
        }
        self.gradient_checkpointing: bool | Recomputation = False  # in the backward pass

    def forward(
        self,
        ids_BT: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        branches: Branches | None = None,
        cache: KeyValueCache | None = None,
        tree: Tree | None = None,
        context: SplitContext | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, BTD.

        ``document_ids_BT`` numbers the documents packed into a row; a position then sees only its
        own document (RoPE is relative, so positions need not start anew). ``branches`` are for rows
        in which several sequences go on from one beginning. ``cache`` continues what it holds.
        ``tree`` says where each token stands and what it sees. With ``context`` the ids are this
        rank's part of longer rows, the documents those of whole rows.
        Errors: UserError if there are more positions than the model was made for; of branches the
        caller has to know the lengths.
        """
        kept: KeyValueCache | SharedPrefix | SplitContext | None = cache
        if context is not None:
            assert branches is None and cache is None and tree is None
            sights, kept = self._sights_in_context(ids_BT, document_ids_BT, context), context
        elif branches is None:
            sights = self._sights(ids_BT, document_ids_BT, cache, tree)
        else:
            assert document_ids_BT is None and cache is None and tree is None
            sights = self._sights_of_branches(branches)
        if tree is not None:
            kept = tree.prefix
        is_selective = self.gradient_checkpointing == "selective"
        x_BTD = self.embed_tokens(ids_BT)
        for index, layer in enumerate(self.layers):
            rotation, may_attend, _ = sights[self.windows[index]]
            if self.recomputes and torch.is_grad_enabled() and cache is None:
                x_BTD = checkpoint(
                    layer,
                    x_BTD,
                    rotation,
                    may_attend,
                    context,
                    index,
                    use_reentrant=False,
                    context_fn=_keep_products if is_selective else noop_context_fn,
                )
            else:
                x_BTD = layer(x_BTD, rotation, may_attend, kept, index)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        return self.norm(x_BTD)

    def packed(self, ids_BT: Tensor, packing: Packing, wanted_L: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm of padded rows, at their tokens only, ND.

        With ``wanted``, numbers of such tokens in any order, theirs alone, LD: what the last layer
        makes of keys and values is then computed nowhere else.
        Errors: UserError if a row is longer than the model was made for.
        """
        num_positions, packing = len(packing.sources_N), packing.filled()
        sights = self._sights_of_packing(packing, ids_BT.shape[1])
        x_ND = self.embed_tokens(ids_BT).flatten(0, 1).index_select(0, packing.sources_N)
        for index, window in enumerate(self.windows):
            layer: Any = self.layers[index]
            given = packing, sights[window], wanted_L if index == len(self.layers) - 1 else None
            if self.recomputes and torch.is_grad_enabled():
                x_ND = checkpoint(layer.packed, x_ND, *given, use_reentrant=False)
            else:
                x_ND = layer.packed(x_ND, *given)
        return self.norm(x_ND if wanted_L is not None else x_ND[:num_positions])

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Next-token logits, BTV, of hidden states of any leading shape."""
        return F.linear(hidden_BTD, self.output_weight)

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass, or parts of them."""
        return self.gradient_checkpointing not in (False, "none")

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
            self.windows,
            self.config.num_key_value_heads,
            self.config.head_dim,
            padding_B,
            capacity=capacity,
            device=self.device,
            dtype=self.dtype,
        )

    def _sights(
        self,
        ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        cache: KeyValueCache | None,
        tree: Tree | None,
    ) -> dict[int | None, Sight]:
        """By window."""
        num_positions = ids_BT.shape[1]
        if tree is not None:
            assert cache is None and document_ids_BT is None
            return self._sights_of_tree(tree)
        if cache is not None:
            assert document_ids_BT is None, "a cache holds one document per row"
            return self.sights_after(cache, num_positions)
        is_same_B1TT = None
        if document_ids_BT is not None:
            is_same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
            is_same_B1TT = is_same_BTT.tril()[:, None]
        return self._sights_of_rows(num_positions, ids_BT.device, is_same_B1TT)

    def _sights_of_tree(self, tree: Tree) -> dict[int | None, Sight]:
        """By window."""
        self._check_length(tree.length)
        device = tree.positions_BT.device
        sights = {}
        for window, table in self.rotary_tables.items():
            sees = tree.sees(window)
            if sees is None:
                near_TT = window_mask(tree.positions_BT.shape[1], window, device)
                sees = None if near_TT is None else near_TT[None, None]
            sights[window] = Sight(_at(tree.positions_BT, *table(tree.length, device)), sees)
        return sights

    def _sights_of_rows(
        self, num_positions: int, device: torch.device, is_same_B1TT: Tensor | None = None
    ) -> dict[int | None, Sight]:
        """By window, of rows that begin at position 0."""
        self._check_length(num_positions)
        sights = {}
        for window, table in self.rotary_tables.items():
            cos_Sh, sin_Sh = table(num_positions, device)
            near_TT = window_mask(num_positions, window, device)
            may_attend = is_same_B1TT
            if near_TT is not None:
                may_attend = near_TT[None, None] if may_attend is None else may_attend & near_TT
            sights[window] = Sight((cos_Sh[:num_positions], sin_Sh[:num_positions]), may_attend)
        return sights

    def sights_after(self, cache: KeyValueCache, num_positions: int) -> dict[int | None, Sight]:
        """Of the next positions of what ``cache`` holds, for which it then has room; by window."""
        cache.reserve(num_positions)
        self._check_length(cache.longest_row + num_positions)
        positions = cache.positions(num_positions)
        end = cache.num_shared + cache.length + num_positions
        return {
            window: Sight(
                _at(positions, *table(end, self.device)), cache.may_attend(num_positions, window)
            )
            for window, table in self.rotary_tables.items()
        }

    def _sights_of_packing(
        self, packing: Packing, num_columns: int
    ) -> dict[int | None, list[Sight]]:
        """By window, of each group; of all positions at once where a kernel attends to them."""
        device = packing.sources_N.device
        if packing.kernel is not None:
            longest = max(group.length for group in packing.groups)
            self._check_length(longest)
            columns_N = packing.sources_N % num_columns
            return {
                window: [Sight(_at(columns_N, *table(longest, device)), None, window)]
                for window, table in self.rotary_tables.items()
            }
        sights: dict[int | None, list[Sight]] = {window: [] for window in self.windows}
        for group in packing.groups:
            if group.branches is not None:
                found = self._sights_of_branches(group.branches)
            else:
                found = self._sights_of_rows(group.length, device)
            for window, sight in found.items():
                sights[window].append(sight)
        return sights

    def _sights_of_branches(self, branches: Branches) -> dict[int | None, Sight]:
        """By window, which counts positions of a sequence and not columns of the row."""
        positions_BT, may_attend_BTT = branches
        num_positions = positions_BT.shape[1]
        distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
        sights = {}
        for window, table in self.rotary_tables.items():
            sees_BTT = may_attend_BTT
            if window is not None and window < num_positions:
                sees_BTT = sees_BTT & (distance_BTT < window)
            rotation = _at(positions_BT, *table(num_positions, positions_BT.device))
            sights[window] = Sight(rotation, sees_BTT[:, None])
        return sights

    def _sights_in_context(
        self, ids_BP: Tensor, document_ids_BT: Tensor | None, context: SplitContext
    ) -> dict[int | None, Sight]:
        """By window, of this rank's part of the rows."""
        num_positions = ids_BP.shape[1] * context.num_ranks
        self._check_length(num_positions)
        positions_P = context.positions(num_positions, ids_BP.device)
        return {
            window: Sight(
                _at(positions_P, *table(num_positions, ids_BP.device)),
                context.may_attend(num_positions, window, document_ids_BT, positions_P),
            )
            for window, table in self.rotary_tables.items()
        }

    def _check_length(self, num_positions: int) -> None:
        if num_positions > self.config.max_position_embeddings:
            raise UserError(
                f"A row has {num_positions} tokens; this model was made for at most "
                f"{self.config.max_position_embeddings} (max_position_embeddings). Shorten the row."
            )


def _at(positions: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos_Sh[positions], sin_Sh[positions]
    if positions.ndim == 2:  # rows at different positions: B1Th beside BHTh
        cos, sin = cos[:, None], sin[:, None]
    return cos, sin

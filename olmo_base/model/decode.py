"""The engines of generation: a batch of rows on their way through a model, a token at a time.

Ours with its own cache, and on a CPU in fp32 with weights laid out for few rows; any other model
through transformers.

B rows, T positions, N = B times T, S positions attended to, D width, H query heads, K key/value
heads, G query heads of each of them, h channels of a head, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_base.model.attention import KeyValueCache
from olmo_base.model.feed_forward import LAYER_NORM_EPS
from olmo_base.model.transformer import Block, Transformer
from olmo_base.run.errors import UserError

FIRST_CAPACITY = 64  # new positions a cache has room for before it grows
MAX_LAID_OUT_BYTES = 2**30  # of weights; a second copy of larger ones costs more than it saves


class Decoder(Protocol):
    """A batch of rows on their way through a model: what all engines do."""

    prompt_ids_BT: Tensor  # what is left to read of the prompts, padded on the left

    def prefill(self) -> Tensor:
        """Read the prompts; the logits after each, BV."""

    def step(self, ids_B: Tensor) -> Tensor:
        """Read one more token of each row; the logits after it, BV."""

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows go on, in this order."""

    @property
    def can_join(self) -> bool:
        """Whether the cache can take in other rows: it keeps every position of every layer."""

    def join(self, other: Any) -> None:
        """Take in the rows of another decoder of the same kind, behind its own."""


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, list[int]]:
    """ids_BT ending in the prompts, and how much padding stands before each."""
    width = max(map(len, prompts))
    padding_B = [width - len(prompt) for prompt in prompts]
    rows = [
        [pad_id] * padding + list(prompt)
        for padding, prompt in zip(padding_B, prompts, strict=True)
    ]
    return torch.tensor(rows), padding_B


class NativeDecoder:
    """Our model with a preallocated cache of keys and values."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        prefix: "NativeDecoder | None" = None,
    ) -> None:
        """``prefix`` has read, as its one row, what all prompts begin with."""
        ids_BT, padding_B = _left_padded(prompts, model.config.pad_token_id)
        self.model = model
        self.cache = model.new_cache(padding_B, capacity=ids_BT.shape[1] + FIRST_CAPACITY)
        if prefix is not None:
            self.cache.begin_with(prefix.cache)
        self.prompt_ids_BT = ids_BT[:, self.cache.length :].to(model.device)

    def prefill(self) -> Tensor:
        """See Decoder."""
        return self._last_logits(self.prompt_ids_BT)

    def step(self, ids_B: Tensor) -> Tensor:
        """See Decoder."""
        return self._last_logits(ids_B[:, None])

    def _last_logits(self, ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.model(ids_BT, cache=self.cache)
        return self.model.logits(hidden_BTD[:, -1])

    def keep_rows(self, rows: list[int]) -> None:
        """See Decoder."""
        self.cache.keep_rows(rows)

    @property
    def can_join(self) -> bool:
        """See Decoder."""
        return set(self.model.windows) == {None}

    def join(self, other: "NativeDecoder") -> None:
        """See Decoder."""
        self.cache.join(other.cache, room=FIRST_CAPACITY)


class LaidOutDecoder(NativeDecoder):
    """The same on a CPU in fp32: the prompts through the model, each step through LaidOutWeights.

    Neighbouring channels of queries and keys are the pairs that RoPE turns, so that it is one
    complex product; the cache's keys are put into that order once the prompts are read.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        weights: "LaidOutWeights",
        prefix: NativeDecoder | None = None,
    ) -> None:
        """``prefix`` is no LaidOutDecoder: its keys are as the model gives them.

        It is kept once for all rows, whose steps look at it in one product.
        """
        skipped = 0 if prefix is None else prefix.cache.length
        super().__init__(model, [prompt[skipped:] for prompt in prompts])
        if prefix is not None:
            self.cache.share(prefix.cache)
        self.weights = weights

    def prefill(self) -> Tensor:
        """See Decoder."""
        logits_BV = super().prefill()
        self.cache.reorder_key_channels(paired_channels(self.model.config.head_dim))
        return logits_BV

    def step(self, ids_B: Tensor) -> Tensor:
        """See Decoder."""
        return self.weights.logits_after(ids_B[:, None], self.cache)


# ---------------------------------------------------------------- weights laid out for few rows

Product = Callable[[Tensor], Tensor]  # x -> x @ weight.T


def is_fast_alone(model: Transformer) -> bool:
    """Whether steps of the model are worth LaidOutWeights.

    They hold plain weights: what an adapter adds beside one would be lost.
    """
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not any(weight.is_inference() for weight in model.parameters())
        and not any(hasattr(part, "base_layer") for part in model.modules())  # peft's layers
        and sum(weight.nbytes for weight in model.parameters()) <= MAX_LAID_OUT_BYTES
    )


def identity_of(model: Transformer) -> tuple[tuple[int, int], ...]:
    """Where the weights are and how often they were written: another one, other weights."""
    return tuple((weight.data_ptr(), weight._version) for weight in model.parameters())


def product(weight: Tensor, num_rows: int) -> Product:
    """The product with ``weight`` in the layout in which so many rows are fastest.

    For one row a wide weight is read along its rows; more go through oneDNN, which keeps the weight
    in blocks instead of packing it in each call. Measured on 2 cores of an EPYC, one thread, for
    2048 x 256: one row 0.3 of F.linear's time, 16 rows 0.5 of it.
    """
    if num_rows == 1:
        if weight.shape[0] < weight.shape[1]:
            return lambda x_1D: F.linear(x_1D, weight)
        turned = weight.t().contiguous()
        return lambda x_1D: torch.mm(x_1D, turned)
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x_BD: multiply(x_BD, blocks, None, "none", [], "")


def paired_channels(head_dim: int) -> Tensor:
    """The order in which a head's channels i and i + h/2 stand side by side, h."""
    return torch.arange(head_dim).view(2, -1).t().flatten()


class LaidOutNorm(NamedTuple):
    """An RMSNorm: x (sum of squares + floor)^-1/2 weight."""

    weight_D: Tensor  # the norm's own times sqrt(D)
    floor: Tensor  # D eps


class LaidOutBlock(NamedTuple):
    """One layer's weights; the norms are those that it has."""

    qkv: Product
    attention_out: Product
    gate_up: Product
    down: Product
    q_norm: LaidOutNorm | None
    k_norm: LaidOutNorm | None
    attention_norm: LaidOutNorm | None
    feed_forward_norm: LaidOutNorm | None


class LaidOutWeights:
    """A model's weights as a step of few rows reads them fastest, and that step."""

    def __init__(self, model: Transformer, num_rows: int) -> None:
        """``num_rows``: 1, or about how many; any number is computed right."""
        config = model.config
        self.model = model
        self.config = config
        self.kv_width = config.num_key_value_heads * config.head_dim
        with torch.no_grad():
            layers = [cast(Block, layer) for layer in model.layers]
            self.blocks = [self._laid_out(layer, num_rows) for layer in layers]
            self.head = product(model.output_weight.detach(), num_rows)

    def _laid_out(self, block: Block, num_rows: int) -> LaidOutBlock:
        attention, order_h = block.attention, paired_channels(self.config.head_dim)

        def paired(weight: Tensor) -> Tensor:
            heads = weight.detach().unflatten(0, (-1, len(order_h)))
            return heads[:, order_h].flatten(0, 1)

        def same(weight: Tensor) -> Tensor:
            return weight.detach()

        def norm(
            module: nn.Module, laid_out: Callable[[Tensor], Tensor] = same
        ) -> LaidOutNorm | None:
            for weight in module.parameters():
                width = len(weight)
                floor = torch.tensor(width * self.config.rms_norm_eps)
                return LaidOutNorm(laid_out(weight) * width**0.5, floor)
            return None

        q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        gate, up = block.feed_forward.gate_proj.weight, block.feed_forward.up_proj.weight
        return LaidOutBlock(
            qkv=product(torch.cat([paired(q), paired(k), v]), num_rows),
            attention_out=product(attention.o_proj.weight.detach(), num_rows),
            gate_up=product(torch.cat([gate, up]), num_rows),
            down=product(block.feed_forward.down_proj.weight.detach(), num_rows),
            q_norm=norm(attention.q_norm, paired),
            k_norm=norm(attention.k_norm, paired),
            attention_norm=norm(block.attention_norm),
            feed_forward_norm=norm(block.feed_forward_norm),
        )

    def logits_after(self, ids_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """Read the next tokens of each row into ``cache``, whose keys are paired; BV.

        Several tokens at once only where the cache gives each row positions of its own.
        """
        model = self.model
        turns_and_masks = {
            window: (_turns(*sight.rotation), _additive(sight.may_attend))
            for window, sight in model.sights_after(cache, ids_BT.shape[1]).items()
        }
        x_ND = F.embedding(ids_BT.flatten(), model.embed_tokens.weight)
        inner = self.config.intermediate_size
        for index, block in enumerate(self.blocks):
            turns, mask = turns_and_masks[model.windows[index]]
            if self.config.norms_inputs:
                normed_ND = _layer_norm(x_ND)
                x_ND = x_ND + self._attended(block, normed_ND, index, turns, mask, cache)
                gate_up_NF = block.gate_up(_layer_norm(x_ND))
                gated_NF = F.silu(gate_up_NF[:, :inner]).mul_(gate_up_NF[:, inner:])
                x_ND = x_ND + block.down(gated_NF)
            else:
                mixed_ND = self._attended(block, x_ND, index, turns, mask, cache)
                x_ND = _plus_normed(x_ND, mixed_ND, block.attention_norm)
                gate_up_NF = block.gate_up(x_ND)
                gated_NF = F.silu(gate_up_NF[:, :inner]).mul_(gate_up_NF[:, inner:])
                x_ND = _plus_normed(x_ND, block.down(gated_NF), block.feed_forward_norm)
        cache.advance(ids_BT.shape[1])
        return self.head(model.norm(x_ND.unflatten(0, ids_BT.shape)[:, -1]))

    def _attended(
        self,
        block: LaidOutBlock,
        x_ND: Tensor,
        index: int,
        turns: Tensor,
        mask: Tensor | None,
        cache: KeyValueCache,
    ) -> Tensor:
        config = self.config
        qkv_ND = block.qkv(x_ND)
        if config.clip_qkv is not None:
            qkv_ND.clamp_(-config.clip_qkv, config.clip_qkv)
        q_ND, k_ND, v_ND = qkv_ND.split([config.hidden_size, self.kv_width, self.kv_width], dim=1)
        if block.q_norm is not None and block.k_norm is not None:
            q_ND = _normed(q_ND, block.q_norm)
            k_ND = _normed(k_ND, block.k_norm)
        heads_BTKh = (cache.num_rows, -1, config.num_key_value_heads, config.head_dim)
        append = cache.append if cache.beginning is None else cache.append_own
        k_BKSh, v_BKSh = append(
            index,
            _turned(k_ND, turns, config.head_dim).view(heads_BTKh).transpose(1, 2),
            v_ND.reshape(heads_BTKh).transpose(1, 2),
        )
        q_NHh = _turned(q_ND, turns, config.head_dim)
        num_tokens, num_rows = x_ND.shape[0], cache.num_rows
        if cache.beginning is not None:
            q_BHh = q_NHh.view(num_rows, -1, config.head_dim)
            mixed_BD = _mixed_behind(cache.beginning[:, index], q_BHh, k_BKSh, v_BKSh, mask)
            return block.attention_out(mixed_BD)
        if mask is not None and num_tokens == num_rows and k_BKSh.is_contiguous():
            return block.attention_out(_mixed_by_products(q_NHh, k_BKSh, v_BKSh, mask))
        q_BTHh = q_NHh.view(num_rows, -1, config.num_attention_heads, config.head_dim)
        mixed_BHTh = F.scaled_dot_product_attention(
            q_BTHh.transpose(1, 2),
            k_BKSh,
            v_BKSh,
            attn_mask=mask,
            enable_gqa=config.num_attention_heads != config.num_key_value_heads,
        )
        return block.attention_out(mixed_BHTh.transpose(1, 2).reshape(num_tokens, -1))


def _mixed_by_products(q_BHh: Tensor, k_BKSh: Tensor, v_BKSh: Tensor, mask_B11S: Tensor) -> Tensor:
    """Attention of one position of each row, BD, as plain products.

    torch's kernel is made for blocks of positions: for 64 rows of 4 heads, 32 channels and 128 keys
    these take 0.8 of its time. They need keys without gaps, which they would copy otherwise.
    """
    batch, kv_heads, num_keys, head_dim = k_BKSh.shape
    q_NGh = q_BHh.reshape(batch * kv_heads, -1, head_dim)
    scores_NGS = torch.bmm(q_NGh, k_BKSh.flatten(0, 1).transpose(1, 2))
    scores_BHS = scores_NGS.view(batch, -1, num_keys)
    chances_BHS = torch.add(mask_B11S[:, 0], scores_BHS, alpha=head_dim**-0.5).softmax(-1)
    return torch.bmm(chances_BHS.view(scores_NGS.shape), v_BKSh.flatten(0, 1)).view(batch, -1)


def _mixed_behind(
    beginning: Tensor, q_BHh: Tensor, k_BKSh: Tensor, v_BKSh: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention of one token of each row to a beginning that all rows share, and to its own keys.

    ``beginning`` holds keys and values, 2KPh; ``mask`` is added to the scores of both. The rows'
    queries meet the beginning in one product of a key head (G queries of a row), and it is read
    once instead of once for each row.
    """
    (first_k_KPh, first_v_KPh), batch, size = beginning, len(q_BHh), q_BHh.shape[-1]
    num_kv_heads, num_shared = first_k_KPh.shape[:2]
    q_BKGh = q_BHh.reshape(batch, num_kv_heads, -1, size) * size**-0.5
    q_KMh = q_BKGh.transpose(0, 1).reshape(num_kv_heads, -1, size)  # M rows and their queries
    first_KMP = torch.bmm(q_KMh, first_k_KPh.transpose(1, 2))
    first_BKGP = first_KMP.view(num_kv_heads, batch, -1, num_shared).transpose(0, 1)
    own_BKGS = torch.matmul(q_BKGh, k_BKSh.transpose(-1, -2))
    scores_BKGs = torch.cat([first_BKGP, own_BKGS], dim=-1)
    if mask is not None:
        scores_BKGs += mask
    weights_BKGs = scores_BKGs.softmax(-1)
    first_KMP = weights_BKGs[..., :num_shared].transpose(0, 1).reshape(first_KMP.shape)
    mixed_BKGh = torch.bmm(first_KMP, first_v_KPh).view(num_kv_heads, batch, -1, size)
    own_BKGh = torch.matmul(weights_BKGs[..., num_shared:], v_BKSh)
    return (own_BKGh + mixed_BKGh.transpose(0, 1)).reshape(batch, -1)


def _turns(cos: Tensor, sin: Tensor) -> Tensor:
    """What the pairs of each token are multiplied by, (N or 1) 1 h/2."""
    half = cos.shape[-1] // 2
    return torch.complex(cos[..., :half], sin[..., :half]).view(-1, 1, half)


def _turned(x_ND: Tensor, turns: Tensor, head_dim: int) -> Tensor:
    pairs = torch.view_as_complex(x_ND.reshape(x_ND.shape[0], -1, head_dim // 2, 2))
    return torch.view_as_real(pairs * turns).flatten(2)


def _additive(may_attend: Tensor | None) -> Tensor | None:
    """0 where a key may be looked at and minus infinity elsewhere: the form that all layers share.

    Of booleans attention would make it anew in each layer.
    """
    if may_attend is None:
        return None
    return torch.where(may_attend, 0.0, -torch.inf)


def _layer_norm(x_ND: Tensor) -> Tensor:
    return F.layer_norm(x_ND, x_ND.shape[-1:], eps=LAYER_NORM_EPS)


def _scale(x_ND: Tensor, norm: LaidOutNorm) -> Tensor:
    """(sum of squares + floor)^-1/2, N1: three calls, for at few rows calls are what counts."""
    length_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return torch.addcmul(norm.floor, length_N1, length_N1).rsqrt_()


def _normed(x_ND: Tensor, norm: LaidOutNorm) -> Tensor:
    """RMSNorm of few rows; torch's own takes three times as long on a CPU."""
    return (x_ND * norm.weight_D).mul_(_scale(x_ND, norm))


def _plus_normed(x_ND: Tensor, y_ND: Tensor, norm: LaidOutNorm | None) -> Tensor:
    assert norm is not None  # only OLMo-1's norms have none
    return torch.addcmul(x_ND, y_ND * _scale(y_ND, norm), norm.weight_D)


# ---------------------------------------------------------------- any other model


class TransformersDecoder:
    """Any causal language model of transformers, with the cache of its own kind."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        prefix: "TransformersDecoder | None" = None,
    ) -> None:
        """``prefix`` has read, as its one row, what all prompts begin with."""
        from transformers import DynamicCache  # heavy; the native engine needs none of it

        ids_BT, padding_B = _left_padded(prompts, pad_id)
        self.model = model
        columns_T = torch.arange(ids_BT.shape[1], device=model.device)
        self.mask_BT = (columns_T >= torch.tensor(padding_B, device=model.device)[:, None]).long()
        self.cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        names = [name for name in ("past_key_values", "cache_params") if name in accepted]
        if not names:
            raise UserError(
                f"{type(model).__name__} keeps no cache that generation could use. "
                "Choose a decoder-only model."
            )
        self.cache_name = names[0]
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        length = 0
        if prefix is not None:
            length = prefix.mask_BT.shape[1]
            for index, layer in enumerate(prefix.cache.layers):
                keys, values = (_shifted(part, padding_B) for part in (layer.keys, layer.values))
                self.cache.update(keys, values, index)
        self.prompt_ids_BT = ids_BT[:, length:].to(model.device)

    def prefill(self) -> Tensor:
        """See Decoder."""
        return self._last_logits(self.prompt_ids_BT)

    def step(self, ids_B: Tensor) -> Tensor:
        """See Decoder."""
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(ids_B), 1)], dim=-1)
        return self._last_logits(ids_B[:, None])

    def _last_logits(self, ids_BT: Tensor) -> Tensor:
        inputs = {"input_ids": ids_BT, "attention_mask": self.mask_BT, **self.extra}
        if self.takes_positions:
            positions_BT = (self.mask_BT.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BT[:, -ids_BT.shape[1] :]
        outputs = self.model(**inputs, **{self.cache_name: self.cache}, use_cache=True)
        return outputs.logits[:, -1]

    def keep_rows(self, rows: list[int]) -> None:
        """See Decoder."""
        kept = torch.tensor(rows, device=self.mask_BT.device)
        self.cache.reorder_cache(kept)  # named after beam search; it selects rows
        self.mask_BT = self.mask_BT[kept]

    @property
    def can_join(self) -> bool:
        """See Decoder."""
        from transformers.cache_utils import DynamicLayer  # as above

        return self.takes_positions and all(type(x) is DynamicLayer for x in self.cache.layers)

    def join(self, other: "TransformersDecoder") -> None:
        """See Decoder."""
        width = max(self.mask_BT.shape[1], other.mask_BT.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_widened(x.keys, width) for x in (mine, theirs)])
            mine.values = torch.cat([_widened(x.values, width) for x in (mine, theirs)])
        masks = [F.pad(x.mask_BT, (width - x.mask_BT.shape[1], 0)) for x in (self, other)]
        self.mask_BT = torch.cat(masks)


def _shifted(part_1KPh: Tensor, padding_B: list[int]) -> Tensor:
    """The keys or values of a beginning, behind the padding of each row and cut at its own end."""
    length = part_1KPh.shape[2]
    rows = [F.pad(part_1KPh, (0, 0, padding, 0))[:, :, :length] for padding in padding_B]
    return torch.cat(rows)


def _widened(part_BKSh: Tensor, width: int) -> Tensor:
    """Keys or values with padding before them."""
    return F.pad(part_BKSh, (0, 0, width - part_BKSh.shape[2], 0))

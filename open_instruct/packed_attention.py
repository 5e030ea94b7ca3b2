"""Rows laid end to end in transformers' models: attention by rows, all else over all of them.

A layer of transformers hands its queries, keys and values to a function that its configuration
names. Ours takes rows apart for attention and lays them end to end again, as the native OLMo does
(``olmo_base/model/packing.py``); where nobody gave it rows it is transformers' own SDPA.
"""

# N positions of all rows, B rows of a group, T positions of its longest row
# H query heads, K key/value heads, h channels of one head, D all heads side by side

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from olmo_base.model.attention import attend
from olmo_base.model.feed_forward import to_matmul_dtype
from olmo_base.model.packing import Group, Packing
from open_instruct.batches import Batch

NAME = "rows_end_to_end"  # of the function, in configurations while a model is trained
# The implementations that it stands in for. Where nobody gives it rows, it is the first of them.
TAKEN_OVER = ("sdpa", "flash_attention_2", "flash_attention_3")
CHANGING = ("softcap", "position_bias", "s_aux")  # what would be done to scores
# Keys of configurations that say how far attention reaches back. Ours lets rows see all of
# themselves, and a mask of ours would replace the window.
REACHES = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window_size",
    "local_attention",
    "window_size",
)
# Kinds of layers in which a row that no window cuts sees all of itself and nothing else. Any other
# (a state, a convolution, an indexer) goes on from one row into the next. A probe shows that too,
# but only as far as a young model's weights let it through.
KINDS = ("full_attention", "sliding_attention", "chunked_attention", "dense", "sparse", "moe")


def attend_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rows: Packing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, (1, H, N, h) to (1, N, H, h), each row by itself.

    Errors: ValueError for scores that are changed before their softmax, and for a row that is
    longer than the layer's window.
    """
    if rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    changed = [name for name in CHANGING if others.get(name) is not None]
    if changed or others.get("is_causal") is False:
        words = ", ".join(changed) or "no order"
        raise ValueError(f"attention with {words} is not computed by rows")
    window = others.get("sliding_window")
    if window is not None and any(group.length > window for group in rows.groups):
        raise ValueError(f"a row is longer than the window of {window} tokens")
    assert len(query) == 1, "rows end to end are one row"
    if rows.kernel is not None and not dropout and value.shape[-1] == query.shape[-1]:
        q_NHh, k_NKh, v_NKh = (to_matmul_dtype(x[0].transpose(0, 1)) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mixed_NHh = rows.kernel.attend(
            q_NHh, k_NKh, v_NKh, rows.row_starts, rows.longest, scale, None
        )
        return mixed_NHh[None], None
    heads = [to_matmul_dtype(x[0].transpose(0, 1).flatten(1)) for x in (query, key, value)]
    parts = zip(
        *(rows.apart(x_ND) for x_ND in heads),
        rows.groups,
        strict=True,
    )
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    mixed = [
        _mix(
            q_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2),
            k_BTD.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2),
            v_BTD.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2),
            group,
            dropout,
            scaling,
        )
        for q_BTD, k_BTD, v_BTD, group in parts
    ]
    return rows.together(mixed).unflatten(-1, (num_heads, -1))[None], None


def _mix(
    q_BHTh: Tensor,
    k_BKTh: Tensor,
    v_BKTh: Tensor,
    group: Group,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """The rows of one group, BTD."""
    head_dim = q_BHTh.shape[-1]
    may_attend = None if group.branches is None else group.branches.may_attend_BTT[:, None]
    is_causal = may_attend is None and group.length > 1
    usual = head_dim**-0.5
    if dropout or v_BKTh.shape[-1] != head_dim:
        mixed_BHTh = F.scaled_dot_product_attention(
            q_BHTh,
            k_BKTh,
            v_BKTh,
            attn_mask=may_attend,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=q_BHTh.shape[1] != k_BKTh.shape[1],
        )
    else:
        if scaling is not None and scaling != usual:
            q_BHTh = q_BHTh * (scaling / usual)
        mixed_BHTh = attend(q_BHTh, k_BKTh, v_BKTh, may_attend, is_causal=is_causal)
    return mixed_BHTh.transpose(1, 2).flatten(2)


AttentionInterface.register(NAME, attend_rows)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for rows that are padded all the same


def leave_uncompiled() -> None:
    """Keep torch from compiling ``attend_rows``, whose groups are others in each batch."""
    AttentionInterface.register(NAME, torch.compiler.disable(attend_rows))


def why_not_rows(model: Any, longest: int | None) -> str | None:
    """Why the model's layers cannot call ``attend_rows``, in words; None if nothing speaks for it.

    ``longest`` is the longest row that will ever be read; None if nobody knows.
    """
    config = model.config.get_text_config()
    name = config._attn_implementation
    if name not in TAKEN_OVER:
        return f"attn_implementation is {name}"
    carrier = what_carries_on(model, config)
    if carrier is not None:
        return f"{carrier} goes on from one row into the next"
    reach = reach_of(config)
    if reach is not None and (longest is None or longest > reach):
        rows = "how long rows are is not known" if longest is None else f"a row has {longest:,}"
        return f"attention reaches back {reach:,} tokens, and {rows}"
    return None


def call_instead(model: Any, name: str) -> str:
    """Let the model's layers call the attention of this name; what they called before."""
    config = model.config.get_text_config()
    before: str = config._attn_implementation
    config._attn_implementation = name
    return before


def reach_of(config: Any) -> int | None:
    """How far attention reaches back in the layer that sees the least; None: to the beginning."""
    values = [getattr(config, key, None) for key in REACHES]
    return min((value for value in values if isinstance(value, int) and value > 0), default=None)


def what_carries_on(model: nn.Module, config: Any) -> str | None:
    """What beside attention mixes the positions of a row, in words; None if nothing does."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - set(KINDS))
    if kinds:
        return f"a layer of kind {kinds[0]}"
    has_convolution = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return "a convolution" if has_convolution else None


def rows_end_to_end(model: Any, batch: Batch) -> dict[str, Any]:
    """What the model or its body is called with, to read the rows of a batch without padding.

    Embedded as padded rows, so that noise on embeddings sees what it always saw.
    """
    packing = batch.packing
    assert packing is not None
    columns_RT = batch.position_ids()
    if columns_RT is None:
        positions_N = packing.sources_N % batch.ids_RT.shape[1]
    else:
        positions_N = columns_RT.flatten().index_select(0, packing.sources_N)
    embedded_ND = model.get_input_embeddings()(batch.ids_RT).flatten(0, 1)
    # A mask of four dimensions is taken as it is, so none is made over all positions at once.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.ids_RT.device)
    return {
        "inputs_embeds": embedded_ND.index_select(0, packing.sources_N)[None],
        "position_ids": positions_N[None],
        "attention_mask": no_mask,
        "use_cache": False,
        "rows": packing,
    }

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
TAKEN_OVER = "sdpa"  # the implementation that it stands in for
CHANGING = ("softcap", "position_bias", "s_aux")  # what would be done to scores
# Keys of configurations that say how far attention reaches back. Ours lets rows see all of
# themselves, and a mask of ours would replace the window.
REACHES = ("sliding_window", "attention_chunk_size", "window_size")


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

    Errors: ValueError for scores that are changed before their softmax.
    """
    if rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    changed = [name for name in CHANGING if others.get(name) is not None]
    if changed or others.get("is_causal") is False:
        words = ", ".join(changed) or "no order"
        raise ValueError(f"attention with {words} is not computed by rows")
    assert len(query) == 1, "rows end to end are one row"
    heads = (to_matmul_dtype(x[0].transpose(0, 1).flatten(1)) for x in (query, key, value))
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


def take_rows(model: Any, longest: int | None) -> str | None:
    """Let the model's layers call ``attend_rows``. If they cannot: why, in words.

    ``longest`` is the longest row that will ever be read; None if nobody knows.
    """
    config = model.config.get_text_config()
    name = config._attn_implementation
    if name != TAKEN_OVER:
        return f"attn_implementation is {name}"
    reach = reach_of(config)
    if reach is not None and (longest is None or longest > reach):
        rows = "how long rows are is not known" if longest is None else f"a row has {longest:,}"
        return f"attention reaches back {reach:,} tokens, and {rows}"
    config._attn_implementation = NAME
    return None


def give_back(model: Any) -> None:
    """Undo ``take_rows``."""
    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        config._attn_implementation = TAKEN_OVER


def reach_of(config: Any) -> int | None:
    """How far attention reaches back in the layer that sees the least; None: to the beginning."""
    values = [getattr(config, key, None) for key in REACHES]
    return min((value for value in values if isinstance(value, int) and value > 0), default=None)


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

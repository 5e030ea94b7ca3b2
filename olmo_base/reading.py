"""How a causal model, ours or Hugging Face's, reads rows that are to be scored.

Rows -> one tensor of ids, with where each token stands and what it sees -> the model -> outputs at
the positions that are looked at. What rows begin with is run once and kept (``run_prefix``).

B rows, T positions, N positions looked at, V vocabulary
"""

import copy
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_base.model.attention import SharedPrefix, Tree
from olmo_base.model.transformer import Transformer
from olmo_base.scored_rows import Row


class Sharing(NamedTuple):
    """What of a model's work rows may share."""

    trees: bool  # options of a question may stand side by side in one row
    prefixes: bool  # rows may go on from keys and values that were computed once


NOTHING = Sharing(trees=False, prefixes=False)


def text_config(model: nn.Module) -> Any:
    """What a model's configuration says of its text part."""
    config: Any = model.config
    return config if isinstance(model, Transformer) else config.get_text_config()


def context_length(model: nn.Module) -> int | None:
    """How many positions the model can read; None where its configuration does not say."""
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int):
            return length
    return None


# ---------------------------------------------------------------- one pass


def outputs_at(
    model: nn.Module,
    ids_BT: Tensor,
    is_scored_BT: Tensor,
    tree: Tree | None = None,
    cache: Any = None,
) -> Tensor:
    """What ``logits_of`` makes logits of, at the positions marked in ``is_scored_BT``, in order.

    Hidden states of our model, whose head is still to run; logits of any other, whose head runs on
    the N positions only. Rows are padded on the right: a causal model cannot see what stands behind
    a position, so no mask is needed without a ``tree``. ``cache`` is transformers' own; our model
    has it in the tree.
    """
    if isinstance(model, Transformer):
        hidden_BTD: Tensor = model(ids_BT, tree=tree)
        return hidden_BTD[is_scored_BT]
    hugging_face: Any = model
    head: nn.Module = hugging_face.get_output_embeddings()

    def keep_scored(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][is_scored_BT][None], *arguments[1:])

    extra: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        extra["past_key_values"] = cache
    if tree is not None:
        extra["position_ids"] = tree.positions_BT
        if tree.may_attend is not None:
            extra["attention_mask"] = _masks(hugging_face, tree)
    # Narrowing the head's input, rather than calling the head ourselves, keeps whatever a model
    # does to its logits afterwards (Gemma's cap, Granite's and Cohere's scale).
    hook = head.register_forward_pre_hook(keep_scored)
    try:
        logits_NV: Tensor = hugging_face(input_ids=ids_BT, **extra).logits[0]
        return logits_NV
    finally:
        hook.remove()


def logits_of(model: nn.Module, outputs_N: Tensor, first: int, last: int) -> Tensor:
    """Logits, in fp32, of the ids from ``first`` to before ``last``; they may be overwritten."""
    if isinstance(model, Transformer):
        return F.linear(outputs_N, model.output_weight[first:last]).float()
    return outputs_N[:, first:last].float()


def _masks(model: Any, tree: Tree) -> Tensor | dict[str, Tensor]:
    """A tree's rule as transformers' models take it: by the name of each kind of layer, if many."""
    config = text_config(model)
    least = torch.finfo(model.dtype).min  # eager attention adds its mask

    def mask(window: int | None) -> Tensor:
        sees = tree.sees(window)
        assert sees is not None
        zeros = torch.zeros(sees.shape, dtype=model.dtype, device=sees.device)
        return zeros.masked_fill_(~sees, least)

    window = getattr(config, "sliding_window", None)
    if SLIDING in _layer_types(config):
        return {FULL: mask(None), SLIDING: mask(window)}
    return mask(None if _layer_types(config) else window)


FULL, SLIDING = "full_attention", "sliding_attention"


def _layer_types(config: Any) -> set[str]:
    """The kinds of its layers; none where all are of one kind, which has the config's window."""
    return set(getattr(config, "layer_types", None) or ())


# ---------------------------------------------------------------- what rows begin with


@dataclass(frozen=True)
class Prefix:
    """What rows begin with, already run: its length, and what the model keeps of it."""

    length: int
    kept: Any  # SharedPrefix of our model, a cache of transformers
    is_in_trees: bool  # whether rows that go on from it say where they stand and what they see


def run_prefix(model: nn.Module, ids: Sequence[int], *, for_trees: bool) -> Prefix:
    """Run the beginning of rows once."""
    ids_1P = torch.tensor([ids], device=next(model.parameters()).device)
    positions_1P = torch.arange(len(ids), device=ids_1P.device)[None]
    kept: Any
    if isinstance(model, Transformer):
        kept = SharedPrefix()
        model(ids_1P, tree=Tree(positions_1P, len(ids), None, kept))
        return Prefix(len(ids), kept, True)
    from transformers import DynamicCache  # heavy; our own model needs none of it

    # A tree's own masks say how far a layer sees: every key is kept. A text's end sees the last.
    kept = DynamicCache() if for_trees else DynamicCache(config=text_config(model))
    is_last_1P = torch.zeros_like(ids_1P, dtype=torch.bool)
    is_last_1P[:, -1] = True
    tree = Tree(positions_1P, len(ids), None) if for_trees else None
    outputs_at(model, ids_1P, is_last_1P, tree, kept)
    return Prefix(len(ids), kept, for_trees)


# ---------------------------------------------------------------- rows


def row_outputs(
    model: nn.Module, batch: Sequence[Row], pad_id: int, prefix: Prefix | None
) -> tuple[Tensor, Tensor]:
    """``outputs_at`` all positions that are read, and where each of them is, place_BT.

    Positions before the end of the prefix have no place.
    """
    device = next(model.parameters()).device
    skipped = 0 if prefix is None else prefix.length
    ids_BT = torch.full((len(batch), max(len(row.ids) for row in batch) - skipped), pad_id)
    is_scored_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for b, row in enumerate(batch):
        ids_BT[b, : len(row.ids) - skipped] = torch.tensor(row.ids[skipped:])
        read = [place - skipped for _, places in row.readings for place in places]
        is_scored_BT[b, [place for place in read if place >= 0]] = True
    place_BT = is_scored_BT.flatten().cumsum(0).view(is_scored_BT.shape) - 1
    tree = cache = None
    is_tree = prefix is not None and prefix.is_in_trees
    if is_tree or any(row.branch_T for row in batch):
        tree = _tree(batch, ids_BT.shape[1], prefix, device)
    if prefix is not None and not isinstance(model, Transformer):
        cache = copy.deepcopy(prefix.kept)
        cache.batch_repeat_interleave(len(batch))
    outputs_N = outputs_at(model, ids_BT.to(device), is_scored_BT.to(device), tree, cache)
    return outputs_N, place_BT


def _tree(batch: Sequence[Row], width: int, prefix: Prefix | None, device: torch.device) -> Tree:
    """Where the tokens of rows stand and what they see: their context and their own branch."""
    skipped = 0 if prefix is None else prefix.length
    branch_BT = torch.full((len(batch), width), -1)  # padding sees itself and other padding
    positions_BT = torch.zeros(branch_BT.shape, dtype=torch.long)
    for b, row in enumerate(batch):
        branches = torch.tensor(row.branch_T or (0,) * len(row.ids))
        places = torch.arange(len(row.ids))
        if row.branch_T:
            # Each branch goes on from the fork: counted from where its number first stands.
            starts = torch.searchsorted(branches, branches)
            places = torch.where(branches > 0, row.fork + places - starts, places)
        branch_BT[b, : len(row.ids) - skipped] = branches[skipped:]
        positions_BT[b, : len(row.ids) - skipped] = places[skipped:]
    length = int(positions_BT.max()) + 1
    branch_BT, positions_BT = branch_BT.to(device), positions_BT.to(device)
    query_BT1, key_B1T = branch_BT[:, :, None], branch_BT[:, None, :]
    is_near_BTT = ((key_B1T == query_BT1) | ((key_B1T == 0) & (query_BT1 > 0))).tril()
    in_prefix_BTP = is_near_BTT.new_ones(1, 1, 1).expand(len(batch), width, skipped)
    may_attend_B1TS = torch.cat([in_prefix_BTP, is_near_BTT], dim=-1)[:, None]
    kept = prefix.kept if prefix is not None else None
    return Tree(
        positions_BT,
        length,
        may_attend_B1TS,
        kept if isinstance(kept, SharedPrefix) else None,
    )


# ---------------------------------------------------------------- what a model can share

# Probing a model takes small forward passes.
_sharing: weakref.WeakKeyDictionary[nn.Module, Sharing] = weakref.WeakKeyDictionary()
# An architecture with other arguments, or another idea of a mask or a cache.
CANNOT = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError)
PROBE_LENGTH = 12
PROBE_WINDOW = 5  # hides a part of the probe's prefix from some of its tokens


def sharing(model: nn.Module) -> Sharing:
    """What rows may share: found by trying, for models not ours."""
    if isinstance(model, Transformer):
        return Sharing(trees=True, prefixes=True)
    if model not in _sharing:
        if _may_read_trees(model) and _reads_trees(model):
            _sharing[model] = Sharing(trees=True, prefixes=True)
        elif "past_key_values" in inspect.signature(model.forward).parameters:
            _sharing[model] = Sharing(trees=False, prefixes=_probe(model, for_trees=False))
        else:
            _sharing[model] = NOTHING
    return _sharing[model]


def _may_read_trees(model: nn.Module) -> bool:
    """Whether its attention takes masks of ours, and has no more kinds of layers than we know."""
    config = text_config(model)
    return (
        getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and _layer_types(config) <= {FULL, SLIDING}
        and "position_ids" in inspect.signature(model.forward).parameters
    )


def _reads_trees(model: nn.Module) -> bool:
    """Probed with a window so narrow that the probe is wider."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    if window is None:
        return _probe(model, for_trees=True)
    config.sliding_window = min(window, PROBE_WINDOW)
    try:
        return _probe(model, for_trees=True)
    finally:
        config.sliding_window = window


@torch.inference_mode()
def _probe(model: nn.Module, *, for_trees: bool) -> bool:
    """Whether rows behind a prefix, as one tree or as texts, have the logits of whole texts."""
    length = min(PROBE_LENGTH, context_length(model) or PROBE_LENGTH)
    vocab_size = int(text_config(model).vocab_size)
    texts = [
        [(7 * place + 3 * text + 1) % vocab_size for place in range(length)] for text in (0, 1)
    ]
    cut, fork = length // 3, length // 2
    if cut < 2:
        return False
    texts[1][:fork] = texts[0][:fork]
    plain = tuple(range(length))
    rows = [Row(tuple(text), [(n, plain)]) for n, text in enumerate(texts)]
    branches = [plain, (*range(fork), *range(length, 2 * length - fork))]
    tree = Row(
        (*texts[0], *texts[1][fork:]),
        list(enumerate(branches)),
        branch_T=(0,) * fork + (1,) * (length - fork) + (2,) * (length - fork),
        fork=fork,
    )
    try:
        whole_NV, _ = row_outputs(model, rows, 0, None)
        prefix = run_prefix(model, texts[0][:cut], for_trees=for_trees)
        found_NV, place_BT = row_outputs(model, [tree] if for_trees else rows, 0, prefix)
    except CANNOT:
        return False
    spread = whole_NV.std().item()
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    for number, positions in enumerate(branches):
        seen = [place for place in range(length) if positions[place] >= cut]
        if for_trees:
            at = place_BT[0, [positions[place] - cut for place in seen]]
        else:
            at = place_BT[number, [place - cut for place in seen]]
        wanted_NV = whole_NV[[number * length + place for place in seen]]
        if not (found_NV[at] - wanted_NV).abs().max().item() <= tolerance * spread:
            return False
    return True

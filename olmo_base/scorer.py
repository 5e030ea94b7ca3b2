"""Log-likelihood of given text under any causal model: ours or Hugging Face's.

Requests (context ids, continuation ids) -> rows that share what they can -> batches of like length
-> logits at continuation positions only -> scores in the order asked.

The options of a question stand side by side behind one copy of their context, each blind to the
others (a tree, not a text), and what many questions begin with is run once. Models that cannot
read trees (windows, flash attention, recurrence) read each option as a text of its own.

B rows, T positions, S positions looked at, N scored positions of a batch, M tokens asked for,
V vocabulary
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_base.model.attention import SharedPrefix, Tree
from olmo_base.model.transformer import Transformer

# Logits of one batch, in numbers: 2**24 are 64 MiB in fp32. A single longer row is let through.
# A GPU wants long batches.
MAX_LOGITS = 2**24
MAX_LOGITS_GPU = 2**28
# Logits that are summed at once. On a CPU 2**19 are 2 MiB, which stay in its caches; fewer than
# MIN_BLOCK columns make slow products.
BLOCK_LOGITS = 2**19
BLOCK_LOGITS_GPU = 2**26
MIN_BLOCK = 1024
MIN_SHARED = 8  # tokens of a context, from which on its options share one copy
MAX_BRANCH_TOKENS = 256  # of all options in a row, unless the context is longer
MIN_PREFIX = 32  # tokens that rows begin with, from which on they are run once
MIN_PREFIX_ROWS = 4
# Rows look at the prefix in copies of its keys and values: its tokens count this much less than
# the rows' own in the budget of a batch.
PREFIX_DISCOUNT = 8

Request = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation.

    ``logprob`` is the sum over its tokens, in nats; ``is_greedy`` says whether each of its tokens
    was the likeliest. ``num_cut`` counts context tokens left out because the model's context is
    too short for them.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool
    token_logprobs: tuple[float, ...] = field(repr=False, default=())
    num_cut: int = 0


# ---------------------------------------------------------------- one interface over both models


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config if isinstance(model, Transformer) else config.get_text_config()


def context_length(model: nn.Module) -> int | None:
    """How many positions the model can read; None where its configuration does not say."""
    config = _text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int):
            return length
    return None


@dataclass(frozen=True)
class Prefix:
    """What rows begin with, already run: its length, and what the model keeps of it."""

    length: int
    kept: Any  # SharedPrefix of our model, a cache of transformers


def outputs_at(
    model: nn.Module,
    ids_BT: Tensor,
    is_scored_BT: Tensor,
    tree: Tree | None = None,
    cache: Any = None,
) -> Tensor:
    """What ``_logits`` makes logits of, at the positions marked in ``is_scored_BT``, row after row.

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
            least = torch.finfo(hugging_face.dtype).min  # eager attention adds its mask
            mask = torch.zeros(
                tree.may_attend.shape, dtype=hugging_face.dtype, device=ids_BT.device
            )
            extra["attention_mask"] = mask.masked_fill_(~tree.may_attend, least)
    # Narrowing the head's input, rather than calling the head ourselves, keeps whatever a model
    # does to its logits afterwards (Gemma's cap, Granite's and Cohere's scale).
    hook = head.register_forward_pre_hook(keep_scored)
    try:
        logits_NV: Tensor = hugging_face(input_ids=ids_BT, **extra).logits[0]
        return logits_NV
    finally:
        hook.remove()


def _logits(model: nn.Module, outputs_N: Tensor, first: int, last: int) -> Tensor:
    """Logits, in fp32, of the ids from ``first`` to before ``last``; they may be overwritten."""
    if isinstance(model, Transformer):
        return F.linear(outputs_N, model.output_weight[first:last]).float()
    return outputs_N[:, first:last].float()


def _run_prefix(model: nn.Module, ids: Sequence[int]) -> Prefix:
    """Run the beginning of rows once."""
    ids_1P = torch.tensor([ids], device=next(model.parameters()).device)
    positions_1P = torch.arange(len(ids), device=ids_1P.device)[None]
    kept: Any
    if isinstance(model, Transformer):
        kept = SharedPrefix()
        model(ids_1P, tree=Tree(positions_1P, len(ids), None, kept))
        return Prefix(len(ids), kept)
    from transformers import DynamicCache  # heavy; our own model needs none of it

    hugging_face: Any = model
    kept = DynamicCache(config=_text_config(model))
    is_last_1P = torch.zeros_like(ids_1P, dtype=torch.bool)
    is_last_1P[:, -1] = True
    outputs_at(hugging_face, ids_1P, is_last_1P, Tree(positions_1P, len(ids), None), kept)
    return Prefix(len(ids), kept)


# Whether a model reads trees; probing it takes two small forward passes.
_reads_trees: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def reads_trees(model: nn.Module) -> bool:
    """Whether options may stand side by side in one row: found by trying, for models not ours."""
    if isinstance(model, Transformer):
        return set(model.windows) == {None}
    if model not in _reads_trees:
        _reads_trees[model] = _may_read_trees(model) and _probe(model)
    return _reads_trees[model]


def _may_read_trees(model: nn.Module) -> bool:
    config = _text_config(model)
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and getattr(config, "sliding_window", None) is None
        and set(layer_types) == {"full_attention"}
        and "position_ids" in inspect.signature(model.forward).parameters
    )


@torch.inference_mode()
def _probe(model: nn.Module) -> bool:
    """Whether a tree behind a prefix has the logits that its texts have."""
    length = min(12, context_length(model) or 12)
    vocab_size = int(_text_config(model).vocab_size)
    texts = [
        [(7 * place + 3 * text + 1) % vocab_size for place in range(length)] for text in (0, 1)
    ]
    cut, fork = length // 3, length // 2
    if cut < 2:
        return False
    texts[1][:fork] = texts[0][:fork]
    rows = [_Row(tuple(text), [(n, tuple(range(length)))]) for n, text in enumerate(texts)]
    places = (*range(fork), *range(length, 2 * length - fork))
    tree = _Row(
        (*texts[0], *texts[1][fork:]),
        [(0, tuple(range(length))), (1, places)],
        branch_T=(0,) * fork + (1,) * (length - fork) + (2,) * (length - fork),
        fork=fork,
    )
    try:
        prefix = _run_prefix(model, texts[0][:cut])
        plain_NV, _ = _row_outputs(model, rows, 0, None)
        tree_NV, place_BT = _row_outputs(model, [tree], 0, prefix)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError):
        return False  # an architecture with other arguments, or another idea of a mask
    spread = plain_NV.std().item()
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    for number, positions in ((0, tuple(range(length))), (1, places)):
        seen = [place for place in range(length) if positions[place] >= cut]
        found_NV = tree_NV[place_BT[0, [positions[place] - cut for place in seen]]]
        wanted_NV = plain_NV[[number * length + place for place in seen]]
        if not (found_NV - wanted_NV).abs().max().item() <= tolerance * spread:
            return False
    return True


# ---------------------------------------------------------------- from requests to rows


@dataclass
class _Row:
    """Ids to run once, and the requests that are read off them: (request, positions).

    Of a tree, ``branch_T`` numbers the option that each token belongs to, 0 being the context,
    and ``fork`` is where options begin; a text has none.
    """

    ids: tuple[int, ...]
    readings: list[tuple[int, tuple[int, ...]]]
    branch_T: tuple[int, ...] = ()
    fork: int = 0

    @property
    def num_scored(self) -> int:
        return sum(len(positions) for _, positions in self.readings)

    @property
    def first_read(self) -> int:
        """The first position that is read; what stands before it may be run elsewhere."""
        return min(positions[0] for _, positions in self.readings)


def _fit(request: Request, max_length: int | None, number: int) -> tuple[Request, int]:
    """The request with its context cut on the left to what the model can read."""
    context, continuation = request
    if not context or not continuation:
        empty = "context" if not context else "continuation"
        raise ValueError(
            f"request {number} has an empty {empty}: scoring needs at least one token of each "
            "(put the end-of-text token before a text that has no context)"
        )
    if max_length is None:
        return request, 0
    room = max_length + 1 - len(continuation)  # the last token is predicted, never read
    if room < 1:
        raise ValueError(
            f"request {number} has a continuation of {len(continuation)} tokens and the model "
            f"reads {max_length}: score it with rolling_logprobs"
        )
    num_cut = max(0, len(context) - room)
    return (context[num_cut:], continuation), num_cut


def _text_rows(requests: Sequence[Request], numbers: Sequence[int]) -> list[_Row]:
    """Rows that are texts, such that each of these requests is read off one of them.

    A request needs the logits of context + continuation[:-1]. Equal inputs run once (one-token
    options such as A, B, C, D), and so do inputs that are the beginning of another one.
    """
    inputs: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number in numbers:
        context, continuation = requests[number]
        first = len(context) - 1
        positions = tuple(range(first, first + len(continuation)))
        inputs.setdefault((*context, *continuation[:-1]), []).append((number, positions))
    rows: list[_Row] = []
    for ids in sorted(inputs, reverse=True):  # an input's extensions come right before it
        if rows and rows[-1].ids[: len(ids)] == ids:
            rows[-1].readings += inputs[ids]
        else:
            rows.append(_Row(ids, inputs[ids]))
    return rows


def _tree_rows(requests: Sequence[Request], numbers: Sequence[int]) -> list[_Row]:
    """Rows of requests that have the same context: it stands there once, their options behind it.

    Options of which one begins another share a branch.
    """
    context = tuple(requests[numbers[0]][0])
    options: dict[tuple[int, ...], list[int]] = {}  # all but the last token -> requests
    for number in numbers:
        options.setdefault(tuple(requests[number][1][:-1]), []).append(number)
    branches: list[tuple[tuple[int, ...], list[int]]] = []
    for option in sorted(options, reverse=True):
        if branches and branches[-1][0][: len(option)] == option:
            branches[-1][1].extend(options[option])
        else:
            branches.append((option, list(options[option])))
    rows: list[_Row] = []
    room = 0
    for option, members in branches:
        if not rows or len(option) > room:
            rows.append(_Row(context, [], (0,) * len(context), len(context)))
            room = max(MAX_BRANCH_TOKENS, len(context))
        row, start = rows[-1], len(rows[-1].ids)
        room -= len(option)
        row.ids += option
        row.branch_T += (row.branch_T[-1] + 1,) * len(option)
        for number in members:
            behind = range(start, start + len(requests[number][1]) - 1)
            row.readings.append((number, (len(context) - 1, *behind)))
    return rows


def _shared_rows(requests: Sequence[Request], has_trees: bool) -> list[_Row]:
    """Rows such that each request is read off one of them."""
    of_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(requests):
        of_context.setdefault(tuple(context), []).append(number)
    alone: list[int] = []
    rows: list[_Row] = []
    for context, numbers in of_context.items():
        if has_trees and len(numbers) > 1 and len(context) >= MIN_SHARED:
            rows += _tree_rows(requests, numbers)
        else:
            alone += numbers
    return rows + _text_rows(requests, alone)


def _by_prefix(rows: Sequence[_Row], has_trees: bool) -> list[tuple[tuple[int, ...], list[_Row]]]:
    """(what the rows begin with, rows), the beginning empty where little is shared."""
    alike: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        is_long = has_trees and row.first_read >= MIN_PREFIX
        alike.setdefault(row.ids[:MIN_PREFIX] if is_long else (), []).append(row)
    few: list[_Row] = []
    groups = []
    for beginning, members in alike.items():
        if not beginning or len(members) < MIN_PREFIX_ROWS:
            few += members
            continue
        least, most = min(row.ids for row in members), max(row.ids for row in members)
        length = min(row.first_read for row in members)  # every position that is read is run
        while least[:length] != most[:length]:
            length -= 1
        groups.append((least[:length], members))
    return [*groups, ((), few)] if few else groups


def _batches(
    rows: Sequence[_Row], num_shared: int, batch_tokens: int, max_scored: int
) -> Iterator[list[_Row]]:
    """Rows, longest first, within the budget of padded tokens and of positions with logits."""
    batch: list[_Row] = []
    num_scored = 0
    for row in sorted(rows, key=lambda row: (-len(row.ids), row.ids)):
        more = row.num_scored
        if batch:
            width = len(batch[0].ids) - num_shared + num_shared // PREFIX_DISCOUNT
            is_full = width * (len(batch) + 1) > batch_tokens
            if is_full or num_scored + more > max_scored:
                yield batch
                batch, num_scored = [], 0
        batch.append(row)
        num_scored += more
    if batch:
        yield batch


# ---------------------------------------------------------------- the scores


@torch.inference_mode()
def continuation_logprobs(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 8192,
    pad_id: int = 0,
    max_length: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_scored: Callable[[dict[int, Score]], None] | None = None,
) -> list[Score]:
    """The log-likelihood of each continuation after its context, in the order asked.

    ``requests`` are (context ids, continuation ids), neither empty. ``batch_tokens`` bounds the
    padded tokens of a batch; neither it nor the order changes a score beyond rounding (1e-5 in
    fp32). ``max_length`` is what the model can read (its own length if None); longer contexts
    lose their beginning, and ``Score.num_cut`` says how much. ``on_progress`` is told the number
    of requests done, ``on_scored`` the scores of each batch by the number of their request.
    Errors: ValueError for an empty side or a continuation that cannot fit.
    """
    limit = max_length or context_length(model)
    fitted = [_fit(request, limit, number) for number, request in enumerate(requests)]
    kept = [request for request, _ in fitted]
    most = MAX_LOGITS_GPU if next(model.parameters()).is_cuda else MAX_LOGITS
    max_scored = most // int(_text_config(model).vocab_size)
    was_training = model.training
    model.eval()
    scores: dict[int, Score] = {}
    can_share = len(kept) > 1 and any(len(context) >= MIN_SHARED for context, _ in kept)
    has_trees = can_share and reads_trees(model)
    for beginning, rows in _by_prefix(_shared_rows(kept, has_trees), has_trees):
        prefix = _run_prefix(model, beginning) if beginning else None
        for batch in _batches(rows, len(beginning), batch_tokens, max_scored):
            found = {
                number: Score(
                    logprob=sum(logprobs),
                    num_tokens=len(logprobs),
                    is_greedy=is_greedy,
                    token_logprobs=tuple(logprobs),
                    num_cut=fitted[number][1],
                )
                for number, logprobs, is_greedy in _read_batch(model, batch, kept, pad_id, prefix)
            }
            scores |= found
            if on_scored is not None:
                on_scored(found)
            if on_progress is not None:
                on_progress(len(scores))
    model.train(was_training)
    return [scores[number] for number in range(len(requests))]


def _row_outputs(
    model: nn.Module, batch: Sequence[_Row], pad_id: int, prefix: Prefix | None
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
    if prefix is not None or any(row.branch_T for row in batch):
        tree = _tree(batch, ids_BT.shape[1], prefix, device)
    if prefix is not None and not isinstance(model, Transformer):
        cache = copy.deepcopy(prefix.kept)
        cache.batch_repeat_interleave(len(batch))
    outputs_N = outputs_at(model, ids_BT.to(device), is_scored_BT.to(device), tree, cache)
    return outputs_N, place_BT


def _tree(batch: Sequence[_Row], width: int, prefix: Prefix | None, device: torch.device) -> Tree:
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


def _read_batch(
    model: nn.Module,
    batch: Sequence[_Row],
    requests: Sequence[Request],
    pad_id: int,
    prefix: Prefix | None,
) -> list[tuple[int, list[float], bool]]:
    """Run one batch; for each of its requests the number, token log-probabilities, greediness."""
    outputs_N, place_BT = _row_outputs(model, batch, pad_id, prefix)
    skipped = 0 if prefix is None else prefix.length
    readings = [(b, number, at) for b, row in enumerate(batch) for number, at in row.readings]
    # A position may serve several requests: M tokens asked for, at n_M among the N positions.
    rows_M = torch.tensor([b for b, _, at in readings for _ in at])
    positions_M = torch.tensor([place - skipped for _, _, at in readings for place in at])
    n_M = place_BT[rows_M, positions_M].to(outputs_N.device)
    targets = [token for _, number, _ in readings for token in requests[number][1]]
    targets_M = torch.tensor(targets, device=outputs_N.device)
    found_M = _target_logprobs(model, outputs_N, n_M, targets_M)
    logprobs_M, is_likeliest_M = (part.tolist() for part in found_M)
    found = []
    first = 0
    for _, number, at in readings:
        last = first + len(at)
        found.append((number, logprobs_M[first:last], all(is_likeliest_M[first:last])))
        first = last
    return found


def _target_logprobs(
    model: nn.Module, outputs_N: Tensor, n_M: Tensor, targets_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at its position, and whether it is the likeliest there.

    The vocabulary is gone through in blocks of w ids, C in all, so that logits stay in the
    processor's caches: they are read four times. Of equal logits the first is the likeliest.
    """
    vocab_size = int(_text_config(model).vocab_size)
    most = BLOCK_LOGITS_GPU if outputs_N.is_cuda else BLOCK_LOGITS
    width = max(MIN_BLOCK, most // len(outputs_N))
    order_M = targets_M.argsort()
    starts_C = torch.arange(0, vocab_size, width, device=targets_M.device)
    begins = [*torch.searchsorted(targets_M[order_M], starts_C).tolist(), len(targets_M)]
    target_M = torch.empty(len(targets_M), device=outputs_N.device)
    is_first_M = torch.zeros(len(targets_M), dtype=torch.bool, device=outputs_N.device)
    largest, sums = [], []
    for block, first in enumerate(range(0, vocab_size, width)):
        logits_Nw = _logits(model, outputs_N, first, min(first + width, vocab_size))
        largest_N = logits_Nw.amax(-1)
        asked_m = order_M[begins[block] : begins[block + 1]]  # whose target is in this block
        if len(asked_m):
            logits_mw, place_m = logits_Nw[n_M[asked_m]], targets_M[asked_m] - first
            target_M[asked_m] = logits_mw.gather(-1, place_m[:, None]).squeeze(-1)
            is_first_M[asked_m] = logits_mw.argmax(-1) == place_m
        sums.append(logits_Nw.sub_(largest_N[:, None]).exp_().sum(-1))
        largest.append(largest_N)
    largest_NC, sums_NC = torch.stack(largest, -1), torch.stack(sums, -1)
    largest_N = largest_NC.amax(-1)
    rest_N = sums_NC.mul_((largest_NC - largest_N[:, None]).exp_()).sum(-1).log()
    is_in_best_M = largest_NC.argmax(-1)[n_M] == targets_M // width
    return target_M - largest_N[n_M] - rest_N[n_M], is_first_M & is_in_best_M


def rolling_windows(ids: Sequence[int], *, prefix_id: int, max_length: int) -> list[Request]:
    """Cut a document into requests that predict each of its tokens exactly once.

    Windows do not overlap: each is read after one token of context (``prefix_id`` for the first),
    and only the last, shorter one is filled up with earlier text. These are lm-eval's windows
    with a context length of 1, so that perplexities can be compared.
    """
    windows: list[Request] = []
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        if start == 0:
            context: Sequence[int] = [prefix_id]
        else:
            context = ids[end - max_length - 1 : start]
        windows.append((context, ids[start:end]))
    return windows


def rolling_logprobs(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    prefix_id: int,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    pad_id: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """The log-likelihood of whole documents of any length, from disjoint windows.

    ``on_progress`` is told the number of windows done. Errors: ValueError for an empty document,
    or a model that does not say its length where ``max_length`` is None.
    """
    limit = max_length or context_length(model)
    if limit is None:
        raise ValueError("the model's configuration names no context length: give max_length")
    windows = [rolling_windows(ids, prefix_id=prefix_id, max_length=limit) for ids in documents]
    if not all(windows):
        raise ValueError(f"document {windows.index([])} is empty")
    scores = iter(
        continuation_logprobs(
            model,
            [window for parts in windows for window in parts],
            batch_tokens=batch_tokens,
            pad_id=pad_id,
            max_length=limit,
            on_progress=on_progress,
        )
    )
    return [document_score([next(scores) for _ in parts]) for parts in windows]


def document_score(windows: Sequence[Score]) -> Score:
    """The score of a document from those of its windows."""
    return Score(
        logprob=sum(score.logprob for score in windows),
        num_tokens=sum(score.num_tokens for score in windows),
        is_greedy=all(score.is_greedy for score in windows),
        token_logprobs=tuple(item for score in windows for item in score.token_logprobs),
    )


def rolling_logprob(
    model: nn.Module,
    ids: Sequence[int],
    *,
    prefix_id: int,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    pad_id: int = 0,
) -> Score:
    """``rolling_logprobs`` of one document."""
    (score,) = rolling_logprobs(
        model,
        [ids],
        prefix_id=prefix_id,
        max_length=max_length,
        batch_tokens=batch_tokens,
        pad_id=pad_id,
    )
    return score

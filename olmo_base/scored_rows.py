"""What a model is to read for given requests: rows that share what they can, in batches.

Requests (context ids, continuation ids) -> texts, or trees of options behind one context -> groups
that begin alike -> batches of like length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MIN_SHARED = 8  # tokens of a context, from which on its options share one copy
MAX_BRANCH_TOKENS = 256  # of all options in a row, unless the context is longer
MIN_PREFIX = 32  # tokens that rows begin with, from which on they are run once
MIN_PREFIX_ROWS = 4
# Rows look at the prefix in copies of its keys and values: its tokens count this much less than
# the rows' own in the budget of a batch.
PREFIX_DISCOUNT = 8

Request = tuple[Sequence[int], Sequence[int]]


@dataclass
class Row:
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


def fit(request: Request, max_length: int | None, number: int) -> tuple[Request, int]:
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


def _text_rows(requests: Sequence[Request], numbers: Sequence[int]) -> list[Row]:
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
    rows: list[Row] = []
    for ids in sorted(inputs, reverse=True):  # an input's extensions come right before it
        if rows and rows[-1].ids[: len(ids)] == ids:
            rows[-1].readings += inputs[ids]
        else:
            rows.append(Row(ids, inputs[ids]))
    return rows


def _tree_rows(requests: Sequence[Request], numbers: Sequence[int]) -> list[Row]:
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
    rows: list[Row] = []
    room = 0
    for option, members in branches:
        if not rows or len(option) > room:
            rows.append(Row(context, [], (0,) * len(context), len(context)))
            room = max(MAX_BRANCH_TOKENS, len(context))
        row, start = rows[-1], len(rows[-1].ids)
        room -= len(option)
        row.ids += option
        row.branch_T += (row.branch_T[-1] + 1,) * len(option)
        for number in members:
            behind = range(start, start + len(requests[number][1]) - 1)
            row.readings.append((number, (len(context) - 1, *behind)))
    return rows


def shared_rows(requests: Sequence[Request], has_trees: bool) -> list[Row]:
    """Rows such that each request is read off one of them."""
    of_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(requests):
        of_context.setdefault(tuple(context), []).append(number)
    alone: list[int] = []
    rows: list[Row] = []
    for context, numbers in of_context.items():
        if has_trees and len(numbers) > 1 and len(context) >= MIN_SHARED:
            rows += _tree_rows(requests, numbers)
        else:
            alone += numbers
    return rows + _text_rows(requests, alone)


def by_prefix(rows: Sequence[Row], goes_on: bool) -> list[tuple[tuple[int, ...], list[Row]]]:
    """(what the rows begin with, rows), the beginning empty where little is shared.

    ``goes_on``: whether the model can go on from a beginning that was run before.
    """
    alike: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        is_long = goes_on and row.first_read >= MIN_PREFIX
        alike.setdefault(row.ids[:MIN_PREFIX] if is_long else (), []).append(row)
    few: list[Row] = []
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


def batches(
    rows: Sequence[Row], num_shared: int, batch_tokens: int, max_scored: int
) -> Iterator[list[Row]]:
    """Rows, longest first, within the budget of padded tokens and of positions with logits."""
    batch: list[Row] = []
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

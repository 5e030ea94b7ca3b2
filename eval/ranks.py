"""One evaluation on several processes (torchrun, accelerate launch): each computes its share.

Every process reads the same questions and has the whole model; requests are dealt out, and what
each computed is gathered by all. Values are plain Python, so they travel over gloo everywhere.
"""

import datetime
import os
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch.distributed as dist

WAIT = datetime.timedelta(hours=24)  # for a process that judges programs, or has the longest share


def start_ranks() -> bool:
    """Join the processes of this launch; whether there are several, and this call joined them."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return False
    dist.init_process_group("gloo", timeout=WAIT)
    return True


def end_ranks() -> None:
    """Leave the other processes."""
    dist.destroy_process_group()


def num_ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process keeps what all have found."""
    return rank() == 0


def wait_for_all() -> None:
    """Go on when all have come here."""
    if num_ranks() > 1:
        dist.barrier()


def gathered(values: dict[int, Any]) -> dict[int, Any]:
    """The values of all processes together, in all of them."""
    if num_ranks() == 1:
        return values
    parts: list[Any] = [None] * num_ranks()
    dist.all_gather_object(parts, values)
    return {key: value for part in parts for key, value in part.items()}


def share(weights: Sequence[int], number: int, of: int) -> range:
    """The part of a list that one process takes: neighbours, of about the same weight in all.

    Neighbours, because the options of a question and questions with the same examples are computed
    together.
    """
    total = sum(weights)
    middles = [end - weight / 2 for end, weight in zip(accumulate(weights), weights, strict=True)]
    owners = [min(of - 1, int(middle * of / max(1, total))) for middle in middles]
    mine = [place for place, owner in enumerate(owners) if owner == number]
    return range(mine[0], mine[-1] + 1) if mine else range(0)

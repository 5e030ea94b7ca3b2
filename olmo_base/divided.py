"""Tensors that are divided over ranks: a rank's part, and the whole."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def copy_part(target: Tensor, whole: Tensor) -> None:
    """Put this rank's part of a whole tensor into ``target``."""
    local_tensor(target).copy_(part_of(whole, target))


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is divided as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    names = like.device_mesh.mesh_dim_names or ()
    part = whole
    for name in ("tensor", "shards"):  # layers are cut first, then what is left is sharded
        if name not in names:
            continue
        placement = like.placements[names.index(name)]
        if placement.is_replicate():
            continue
        dim = placement.dim  # type: ignore[attr-defined]
        pieces = part.chunk(like.device_mesh[name].size(), dim)
        index = like.device_mesh.get_local_rank(name)
        part = pieces[index] if index < len(pieces) else part.narrow(dim, 0, 0)
    return part


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of it, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of it, on every rank; all ranks of its mesh must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for dim, placement in enumerate(placements):  # shards first: they were cut last
        if not placement.is_replicate():
            placements[dim] = Replicate()
            tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()

"""Checkpoints of several ranks, or at a URI: each rank writes its part while training goes on.

    step_000100/
        __0_0.distcp …  each rank's part of weights and optimizer state, by torch's own format
        .metadata       which part is where
        state.pt        counters and random generators; read with weights_only=True
        index.json      size and SHA-256 of all of them, written last

Any number of ranks reads what any other number wrote. On a disk the folder gets its name when it is
complete; in a store that cannot rename, a checkpoint is one that has its index.json.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from olmo_base.run.artefact import RunFolder, flush_to_disk, sha256_file
from olmo_base.run.errors import UserError
from olmo_base.run.resume import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointConfig,
    checkpoint_problem,
    latest_checkpoint,
    outdated,
    unwritable,
)

# One process by itself is meant; torch would say each time that it assumes so.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class ShardedCheckpoints:
    """Where the checkpoints of a run of several ranks stand, and the one being written."""

    def __init__(self, folder: RunFolder, config: CheckpointConfig, uri: str | None) -> None:
        """``uri`` says where they go if not into the run's folder."""
        self._folder, self._config = folder, config
        self._store = None if uri is None else UriStore(uri)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: tuple[int, Future[None]] | None = None

    # ------------------------------------------------------------ writing

    def begin(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy everything, and write it in the background; waits for the one before.

        Errors: UserError if that one could not be written.
        """
        self.finish()
        name = f"step_{step:06d}"
        unfinished = self._folder.checkpoints / f".{name}.tmp"
        if self._rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._meet()
        unfinished.mkdir(parents=True, exist_ok=True)
        kept = io.BytesIO()
        torch.save(dict(state), kept)
        is_alone = self._group is None
        writing = dcp.async_save(
            dict(tensors),
            storage_writer=FileSystemWriter(unfinished),
            process_group=self._group,
            no_dist=is_alone,
        )
        assert isinstance(writing, Future)
        end = self._pool.submit(self._complete, writing, unfinished, name, kept.getvalue())
        self._pending = (step, end)

    def _complete(self, writing: "Future[Any]", unfinished: Path, name: str, state: bytes) -> None:
        """In the background: describe what this rank wrote; the first rank gives it its name."""
        writing.result()
        mine = sorted(unfinished.glob(f"__{self._rank}_*"))
        if self._rank == 0:
            (unfinished / "state.pt").write_bytes(state)
            mine += [unfinished / "state.pt", unfinished / ".metadata"]
        described = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in mine
        }
        if self._store is not None:
            self._store.put(mine, name)
        if self._group is not None:
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, described, group=self._group)
            described = {key: value for files in of_ranks for key, value in files.items()}
        if self._rank == 0:
            step = int(name.removeprefix("step_"))
            index = unfinished / "index.json"
            index.write_text(json.dumps({"step": step, "files": described}, indent=2), "utf-8")
            self._publish(unfinished, name)
        elif self._store is not None:  # this node may have a disk of its own, or the first rank's
            for file in mine:
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                unfinished.rmdir()

    def _publish(self, unfinished: Path, name: str) -> None:
        if self._store is not None:
            self._store.put([unfinished / "index.json"], name)
            shutil.rmtree(unfinished, ignore_errors=True)
            for old in outdated(self._store.names(), self._config):
                self._store.remove(old)
        else:
            path = self._folder.checkpoints / name
            if path.exists():  # a corrupt one of the same step
                shutil.rmtree(path)
            flush_to_disk(unfinished / "index.json")
            os.replace(unfinished, path)
            flush_to_disk(path.parent)
            for old in outdated([p.name for p in path.parent.iterdir()], self._config):
                shutil.rmtree(path.parent / old)
        self._folder.note_time()

    def problem(self) -> BaseException | None:
        """What went wrong with the one being written, as far as is known now; nothing waits."""
        if self._pending is None or not self._pending[1].done():
            return None
        return self._pending[1].exception()

    def finish(self) -> None:
        """Wait until the one being written is complete. Errors: UserError if it cannot be."""
        if self._pending is None:
            return
        (step, end), self._pending = self._pending, None
        problem = end.exception()
        if problem is not None:
            raise unwritable(step, _cause(problem)) from problem

    # ------------------------------------------------------------ reading

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, on this node's disk; None if there is none.

        Errors: UserError if there are some and none is as it was written.
        """
        found: list[Any] = [None, None]
        if self._rank == 0:
            try:
                found[0] = (
                    self._latest_of_store() if self._store else latest_checkpoint(self._folder)
                )
            except UserError as error:
                found[1] = str(error)
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        if found[1] is not None:
            raise UserError(found[1])
        checkpoint: Checkpoint | None = found[0]
        is_first_of_node = self._rank > 0 and int(os.environ.get("LOCAL_RANK", "0")) == 0
        if checkpoint is not None and self._store is not None and is_first_of_node:
            self._store.get(f"step_{checkpoint.step:06d}", checkpoint.path)
        self._meet()
        return checkpoint

    def _latest_of_store(self) -> Checkpoint | None:
        assert self._store is not None
        names = self._store.names()
        for name in reversed(names):
            path = (
                Path(tempfile.gettempdir()) / f"open_instruct_{self._folder.identity[:16]}_{name}"
            )
            problem = self._store.get(name, path)
            if problem is None:
                return Checkpoint(path, int(name.removeprefix("step_")))
            where = f"{self._store.uri}/{name}"
            self._folder.log(f"checkpoint {where} is corrupt ({problem}); looking before it")
        if names:
            raise UserError(
                f"Every checkpoint in {self._store.uri} is corrupt. Give another checkpoint_dir to "
                "start from the beginning."
            )
        return None

    def _meet(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)


def read_parts(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill ``tensors`` in place from what any number of ranks wrote; returns the state beside."""
    reader = CarefulReader(checkpoint.path)
    reader.read_metadata()  # torch would tell of its errors at length
    dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    state = torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
    return dict(state)


def is_sharded(checkpoint: Checkpoint) -> bool:
    """Whether it is of several ranks, and not one process's model.safetensors and state.pt."""
    return (checkpoint.path / ".metadata").is_file()


class CarefulReader(FileSystemReader):
    """Reads .metadata, which is a pickle, without running anything that stands in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is where."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _CarefulUnpickler(file).load()
        assert isinstance(metadata, Metadata)
        return metadata


class _CarefulUnpickler(pickle.Unpickler):
    _modules = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _names = frozenset(
        {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
    )

    def find_class(self, module: str, name: str) -> Any:
        """Only what describes tensors and places."""
        found = super().find_class(module, name)
        is_described = module in self._modules and getattr(found, "__module__", None) == module
        if is_described or (module, name) in self._names or isinstance(found, torch.dtype):
            return found
        raise UserError(f"A checkpoint's .metadata names {module}.{name}, which is not data.")


# ---------------------------------------------------------------- stores that are no disk


BUCKETS = {"s3", "s3a", "gs", "gcs"}  # protocols of stores in which a file's name is all there is


class UriStore:
    """Checkpoints at a URI that fsspec knows: s3://bucket/run, gs://…, file://…, memory://…"""

    def __init__(self, uri: str) -> None:
        """Errors: UserError if what the URI needs is not installed."""
        import fsspec  # only for runs that ask for it

        self.uri = uri.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.uri)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"checkpoint_dir {uri} cannot be opened: {error}. For s3:// install s3fs, for "
                "gs:// install gcsfs."
            ) from None
        protocols = self._files.protocol
        known = {protocols} if isinstance(protocols, str) else set(protocols)
        self._has_folders = not known & BUCKETS
        if not self._has_folders:
            self._check_bucket()

    def _check_bucket(self) -> None:
        """Errors: UserError if it cannot be read, before anything is computed that it should keep.

        A bucket is never made: of a name that is mistyped nobody would know where things went.
        """
        bucket = self._root.partition("/")[0]
        problem = "there is no such bucket"
        try:
            is_there = self._files.exists(bucket)
        except Exception as error:  # each store has its own: no network, no credentials, no right
            is_there, problem = False, str(error) or type(error).__name__
        if not is_there:
            raise UserError(
                f"checkpoint_dir {self.uri} cannot be used: {problem.rstrip('.')}. Make the bucket "
                f"{bucket} and give this machine the right to it, or name another place."
            )

    def names(self) -> list[str]:
        """Complete checkpoints, the oldest first."""
        if not self._files.exists(self._root):
            return []
        found = [Path(path).name for path in self._files.ls(self._root, detail=False, refresh=True)]
        steps = [name for name in found if CHECKPOINT_NAME.fullmatch(name)]
        complete = [name for name in steps if self._files.exists(f"{self._root}/{name}/index.json")]
        return sorted(complete, key=lambda name: int(name.removeprefix("step_")))

    def put(self, files: list[Path], name: str) -> None:
        """Copy files there."""
        if self._has_folders:
            self._files.makedirs(f"{self._root}/{name}", exist_ok=True)
        for file in files:
            self._files.put_file(str(file), f"{self._root}/{name}/{file.name}")

    def get(self, name: str, path: Path) -> str | None:
        """Copy a checkpoint here; what is wrong with it, in words, None if it is as written."""
        if path.is_dir() and checkpoint_problem(path) is None:
            return None
        path.mkdir(parents=True, exist_ok=True)
        self._files.get_file(f"{self._root}/{name}/index.json", str(path / "index.json"))
        try:
            for file in json.loads((path / "index.json").read_text("utf-8"))["files"]:
                self._files.get_file(f"{self._root}/{name}/{Path(file).name}", str(path / file))
        except (FileNotFoundError, ValueError, KeyError) as error:
            return str(error) or type(error).__name__
        return checkpoint_problem(path)

    def remove(self, name: str) -> None:
        """Delete a checkpoint, its index first, so that it is never half there."""
        self._files.rm_file(f"{self._root}/{name}/index.json")
        self._files.rm(f"{self._root}/{name}", recursive=True)


def _cause(problem: BaseException) -> BaseException:
    """Of what went wrong on several ranks, the first."""
    if isinstance(problem, CheckpointException):
        return next(iter(problem.failures.values()))[0]
    return problem

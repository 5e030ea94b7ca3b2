"""The run folder: what goes into it, written so that a reader never sees half of anything.

A run's folder is a Hugging Face model folder, with ``recipe.yaml``, ``manifest.json``,
``metrics.jsonl``, ``train.log`` and ``checkpoints/`` beside the weights.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from olmo_base.run.errors import UserError
from olmo_base.run.launch import hardware, is_main_process, source_commit, versions
from olmo_base.run.recipe import deciding_keys, recipe_to_yaml, setting

MANIFEST = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
LEFT_BY_A_RUN = {".lock", "train.log"}  # what may stand in a folder that holds no run yet


@dataclass(frozen=True)
class RunConfig:
    """Where a run is kept, and the seed of all its random choices."""

    output_dir: str = setting(changes_result=False)
    seed: int = setting(42, low=0, high=2**31 - 1)


@dataclass
class ExampleCounts:
    """What became of every example: nothing is lost without being counted here."""

    used: int = 0
    truncated: int = 0
    split: int = 0  # into several that are used
    dropped: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, number: int = 1) -> None:
        """Count ``number`` examples as left out because of ``reason`` (a few words)."""
        self.dropped[reason] += number

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "used": self.used,
            "truncated": self.truncated,
            **({"split": self.split} if self.split else {}),
            "dropped": dict(sorted(self.dropped.items())),
        }


# ---------------------------------------------------------------- files written whole or not at all


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its name only if the block succeeds.

    A folder that already stands at ``path`` is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders; a run is shared like others
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors makes private files
                flush_to_disk(file)
        if path.exists():
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
        flush_to_disk(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into(source: Path, folder: Path) -> None:
    """Move every file of ``source`` into ``folder``, each by one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        os.replace(file, folder / file.name)


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits; constant memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- model folders as inputs


def resolve_model(name_or_path: str) -> Path:
    """The local folder of a model: a folder as it is, or a hub name's downloaded snapshot.

    An adapter's folder is a model too; ``adapter_base`` names what it stands on.
    Errors: UserError when it is neither, or when the folder holds no config.json.
    """
    folder = Path(name_or_path)
    if not folder.exists():
        folder = _hub_snapshot(name_or_path)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. Give the folder that holds the model.")
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        unfinished = _unfinished_note(folder)
        raise UserError(
            f"{folder} holds no config.json, so it is not a model folder.{unfinished} "
            "Give the output_dir of a finished run or a Hugging Face model folder."
        )
    return folder


def adapter_base(folder: Path) -> str | None:
    """The model that the adapter in ``folder`` stands on: a folder or hub name.

    None if it holds none: it has no adapter_config.json, or it has a config.json, which makes it a
    whole model. Errors: UserError if adapter_config.json does not say it.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(f"{path} does not name a base model (base_model_name_or_path).")
    return base


def adapter_vocabulary(folder: Path) -> int:
    """Rows that the embedding must have for the adapter in ``folder``; 0 if it trained no token."""
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    rows = settings.get("trainable_token_indices") or {}
    lists = rows.values() if isinstance(rows, dict) else [rows]
    return max((max(ids) + 1 for ids in lists if ids), default=0)


def resolve_base(folder: Path, base: str) -> Path:
    """The folder of the model that the adapter in ``folder`` stands on.

    Errors: UserError if it is not where the adapter says, or is an adapter itself.
    """
    try:
        below = resolve_model(base)
    except UserError as error:
        raise UserError(
            f"{folder} is an adapter on {base}, which cannot be found. Put that model back, or "
            f"write where it is now into {folder / ADAPTER_CONFIG} (base_model_name_or_path). "
            f"{error}"
        ) from None
    if adapter_base(below) is not None:
        raise UserError(
            f"{folder} is an adapter on {below}, which is an adapter itself. Merge that one first: "
            f"open-instruct merge {below} OUT."
        )
    return below


def _unfinished_note(folder: Path) -> str:
    try:
        status = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError):
        return ""
    return " Its run has not finished: run its recipe again." if status == "running" else ""


def _hub_snapshot(name: str) -> Path:
    missing = (
        f"{name} is not a folder here. Give the folder of a model, or check the path "
        "(paths are relative to the working directory)."
    )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(missing)
    from huggingface_hub import snapshot_download  # heavy, and only for models of the hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{missing} As the name of a model on the Hugging Face hub it could not be "
            f"fetched either: {first_line}"
        ) from None


def model_files(name_or_path: str | Path) -> list[Path]:
    """The files of a model folder that decide how it behaves: weights, config, tokenizer, template.

    Of an adapter those of its base too. Errors: UserError when there is no such model.
    """
    folder = resolve_model(str(name_or_path))
    beside = {MANIFEST, "report.json", "trainer_state.json"}
    wanted = [
        file
        for pattern in ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "merges.txt")
        for file in folder.glob(pattern)
        if file.name not in beside and not file.name.startswith(".")
    ]
    if not any(file.suffix in (".safetensors", ".bin") for file in wanted):
        raise UserError(
            f"{folder} holds no weights (*.safetensors).{_unfinished_note(folder)} "
            "Give the output_dir of a finished run or a Hugging Face model folder."
        )
    base = adapter_base(folder)
    return sorted(wanted) + ([] if base is None else model_files(resolve_base(folder, base)))


def refuse_changed_base(folder: Path, base: str) -> None:
    """What a run trained beside the weights of its base means nothing beside others.

    Errors: UserError if the manifest of the adapter in ``folder`` knows other weights.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return  # not made by a run of ours: nothing is known of its base
    known = {item["sha256"] for item in manifest.get("inputs", {}).values()}
    weights = [file for file in model_files(base) if file.suffix in (".safetensors", ".bin")]
    changed = [
        name for name, item in describe_inputs(weights).items() if item["sha256"] not in known
    ]
    if changed:
        raise UserError(
            f"The adapter in {folder} was trained on other weights than {changed[0]} holds now. "
            "Put those back, or train the adapter again."
        )


# ---------------------------------------------------------------- the folder of one run


def run_identity(recipe: Any, inputs: dict[str, str]) -> str:
    """What makes two runs the same run: the keys that decide it and its inputs' content."""
    content = json.dumps(
        {"recipe": deciding_keys(recipe), "inputs": sorted(inputs.values())}, sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()


class RunFolder:
    """One run's folder. ``open`` makes it, finds it again after a stop, or refuses another run's.

    On ranks other than the first it writes nothing.
    """

    def __init__(self, recipe: Any, identity: str, inputs: dict[str, dict[str, Any]]) -> None:
        self.recipe = recipe
        self.path = Path(recipe.run.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.identity = identity
        self.counts = ExampleCounts()
        self.data: dict[str, Any] = {}  # what else is to be known of the data; for the manifest
        self.is_finished = False
        self.is_main = is_main_process()
        self._inputs = inputs
        self._sessions: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, recipe: Any, inputs: Sequence[Path]) -> "RunFolder":
        """Start a run, or find the one that was stopped.

        ``recipe`` has a ``stage`` and a ``run: RunConfig``; ``inputs`` are the files whose content
        decides the result. The same run finished before: ``is_finished`` is true and nothing is
        touched. A run that failed before it made anything gives its folder up. Errors: UserError
        if the folder holds another run, or other things, or is in use.
        """
        described = describe_inputs(inputs)
        hashes = {name: item["sha256"] for name, item in described.items()}
        folder = cls(recipe, run_identity(recipe, hashes), described)
        manifest = read_manifest(folder.path)
        if manifest is None:
            folder._refuse_foreign_content()
        elif manifest.get("identity") != folder.identity and folder._holds_work():
            raise UserError(
                f"{folder.path} holds another run (stage {manifest.get('stage')}, "
                f"{manifest.get('status')}): {folder._difference(manifest)}. "
                "Choose another output_dir, or move that folder away."
            )
        elif manifest.get("identity") == folder.identity:
            folder.is_finished = manifest.get("status") == "finished"
            folder._sessions = manifest.get("sessions", [])
        if folder.is_finished or not folder.is_main:
            return folder
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._take_lock()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        folder._sessions.append({"started": started, "seconds": 0.0})
        atomic_write(folder.path / "recipe.yaml", recipe_to_yaml(recipe))
        folder._write_manifest("running")
        return folder

    @property
    def run_id(self) -> str:
        """A name for this run in places outside its folder; another run made anew has another."""
        started = self._sessions[0]["started"] if self._sessions else ""
        return hashlib.sha256(f"{self.identity} {started}".encode()).hexdigest()[:12]

    def _holds_work(self) -> bool:
        """Whether a run left more than its start: one that failed on its data, say, did not."""
        names = {file.name for file in self.path.iterdir()} - LEFT_BY_A_RUN
        if names == {"recipe.yaml", MANIFEST, "metrics.jsonl"}:
            return (self.path / "metrics.jsonl").stat().st_size > 0
        return names != {"recipe.yaml", MANIFEST}

    def _refuse_foreign_content(self) -> None:
        if self.path.is_file():
            raise UserError(f"output_dir {self.path} is a file. Name a folder.")
        if self.path.is_dir():
            foreign = sorted(
                file.name for file in self.path.iterdir() if file.name not in LEFT_BY_A_RUN
            )
            if foreign:
                raise UserError(
                    f"output_dir {self.path} is not empty and holds no run of ours "
                    f"(found {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}). "
                    "Choose another output_dir."
                )

    def _difference(self, manifest: dict[str, Any]) -> str:
        """The first things in which that run differs from this one, in words."""
        if manifest.get("stage") != self.recipe.stage:
            return f"this recipe's stage is {self.recipe.stage}"
        before, now = manifest.get("recipe", {}), deciding_keys(self.recipe)
        keys = [
            key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
        ]
        if keys:
            words = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys[:3]]
            return "; ".join(words) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")
        old = {item["sha256"] for item in manifest.get("inputs", {}).values()}
        changed = [name for name, item in self._inputs.items() if item["sha256"] not in old]
        return f"the content of {', '.join(changed[:3]) or 'an input'} has changed"

    def _take_lock(self) -> None:
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the run ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.path} is in use by another process. Wait for it, or stop it first."
            ) from None

    def log(self, message: str) -> None:
        """Show a line in the terminal and keep it in train.log."""
        if not self.is_main:
            return
        print(message, file=sys.stderr, flush=True)
        self.keep(message)

    def keep(self, message: str) -> None:
        """Write a line to train.log only."""
        if not self.is_main:
            return
        stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        with open(self.path / "train.log", "a", encoding="utf-8") as file:
            file.write("".join(f"{stamp} {line}\n" for line in message.splitlines() or [""]))

    def note_time(self) -> None:
        """Keep how long this session has run; checkpoints call it, so that a kill loses little."""
        if self.is_main:
            self._write_manifest("running")

    def finish(self, **results: Any) -> None:
        """Mark the run as finished: the last thing a stage does. ``results`` go to the manifest."""
        if self.is_main:
            self._write_manifest("finished", results)
            self.release()
        self.is_finished = True

    def release(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _write_manifest(self, status: str, results: dict[str, Any] | None = None) -> None:
        self._sessions[-1]["seconds"] = round(time.monotonic() - self._started, 3)
        manifest = {
            "stage": self.recipe.stage,
            "status": status,
            "identity": self.identity,
            "recipe": deciding_keys(self.recipe),
            "inputs": self._inputs,
            "examples": self.counts.as_dict(),
            "data": self.data,
            "results": results or {},
            "wall_time_seconds": round(sum(item["seconds"] for item in self._sessions), 3),
            "sessions": self._sessions,
            "versions": versions(),
            "git_commit": source_commit(),
            "hardware": hardware(),
            "command": sys.argv,
        }
        atomic_write(
            self.path / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        )


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """A run folder's manifest, or None if there is none. Errors: UserError if it is corrupt."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file. Name a folder.") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is corrupt. Move the folder away and run again.")
    return manifest


def describe_inputs(inputs: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Path -> SHA-256 and size in bytes, for each input file.

    Errors: UserError naming a file that is missing or cannot be read.
    """
    described: dict[str, dict[str, Any]] = {}
    for path in inputs:
        try:
            described[str(path)] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return described

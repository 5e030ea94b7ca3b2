"""Handing over to vLLM: our arguments as those of ``vllm serve``, which then takes this process."""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo_base.run.artefact import ADAPTER_CONFIG, adapter_base, resolve_base, resolve_model
from olmo_base.run.errors import UserError
from open_instruct.chat.hosts import is_loopback
from open_instruct.chat.voices import API_KEY_VARIABLE

KEY_VARIABLE = "VLLM_API_KEY"  # where vLLM looks, so that no list of processes shows the key
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes for --max-lora-rank


def hand_over(
    models: Sequence[str],
    *,
    host: str,
    port: int,
    api_key: str | None,
    cors_origins: Sequence[str],
) -> None:
    """Become vLLM's server. Errors: UserError if it is not there or cannot do what is asked."""
    command = ["vllm", *vllm_arguments(models, host, port, cors_origins)]
    here = Path(sys.executable).parent
    program = shutil.which("vllm") or shutil.which("vllm", path=str(here))
    if program is None:
        raise UserError(
            "--backend vllm needs vLLM, which is not installed: pip install vllm. It wants a GPU; "
            "leave --backend out to serve without it."
        )
    key = api_key or os.environ.get(API_KEY_VARIABLE)
    if key is None and not is_loopback(host):
        key = secrets.token_urlsafe(32)
        print(f"API key, shown this once: {key}", file=sys.stderr)
    environment = os.environ | ({KEY_VARIABLE: key} if key else {})
    print(f"Handing over: {' '.join(command)}", file=sys.stderr, flush=True)
    os.execve(program, command, environment)


def vllm_arguments(
    models: Sequence[str], host: str, port: int, cors_origins: Sequence[str]
) -> list[str]:
    """What ``vllm`` is called with. One base, and adapters on it. Errors: UserError."""
    folders = {name.rstrip("/") or name: resolve_model(name) for name in models}
    adapters = {name: folder for name, folder in folders.items() if adapter_base(folder)}
    bases = {folder.resolve(): name for name, folder in folders.items() if name not in adapters}
    for folder in adapters.values():
        base = resolve_base(folder, str(adapter_base(folder)))
        bases.setdefault(base.resolve(), str(base))
    if len(bases) != 1:
        raise UserError(
            f"vLLM serves one model and adapters on it, not {len(bases)}: "
            f"{', '.join(bases.values())}. Start it once for each, at ports of their own."
        )
    ((base, name),) = bases.items()
    arguments = ["serve", str(base), "--served-model-name", name]
    arguments += ["--host", host, "--port", str(port)]
    if cors_origins:
        arguments += ["--allowed-origins", json.dumps(list(cors_origins))]
    if adapters:
        rank = max(_rank(folder) for folder in adapters.values())
        limits = [limit for limit in RANKS if limit >= rank]
        if not limits:
            raise UserError(f"vLLM takes adapters up to rank {RANKS[-1]}; one here has {rank}.")
        arguments += ["--enable-lora", "--max-lora-rank", str(limits[0]), "--lora-modules"]
        arguments += [f"{one}={folder}" for one, folder in adapters.items()]
    return arguments


def _rank(folder: Path) -> int:
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        raise UserError(
            f"{folder} is a DoRA adapter, which vLLM does not serve beside its base. Merge it: "
            f"open-instruct merge {folder} OUT."
        )
    return max([int(settings.get("r", 8)), *(settings.get("rank_pattern") or {}).values()])

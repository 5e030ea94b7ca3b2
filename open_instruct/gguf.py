"""A model folder as one GGUF file, by the converter that comes with llama.cpp."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from olmo_base.run.artefact import adapter_base, resolve_model
from olmo_base.run.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
FOLDER_VARIABLE = "LLAMA_CPP"
OUT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def find_converter() -> Path:
    """llama.cpp's script. Errors: UserError that says where it was looked for."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:
        script = Path(folder) / CONVERTER
        if not script.is_file():
            raise UserError(f"{FOLDER_VARIABLE} is {folder}, and there is no {CONVERTER} in it.")
        return script
    found = shutil.which(CONVERTER)
    if found is None:
        raise UserError(
            f"GGUF files are written by llama.cpp's {CONVERTER}, which is not installed: get "
            "llama.cpp (github.com/ggml-org/llama.cpp) with its Python requirements, and set "
            f"{FOLDER_VARIABLE} to its folder."
        )
    return Path(found)


def convert_to_gguf(source: str, target: str, dtype: str | None = None) -> Path:
    """Write the model in ``source`` as the file ``target``; None keeps what its weights are in.

    Errors: UserError if the converter is not there, fails, or ``source`` is an adapter.
    """
    folder, out = resolve_model(source), Path(target)
    if adapter_base(folder) is not None:
        raise UserError(
            f"{folder} is an adapter. Merge it first: open-instruct merge {folder} OUT."
        )
    if out.suffix != ".gguf":
        raise UserError(f"{out}: the name of a GGUF file ends in .gguf.")
    if out.exists():
        raise UserError(f"{out} exists already. Name a new file.")
    script = find_converter()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.gguf")
    kind = "auto" if dtype is None else OUT_TYPES[dtype]
    command = [sys.executable, str(script), str(folder), "--outfile", str(temporary)]
    try:
        done = subprocess.run(
            [*command, "--outtype", kind], capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not temporary.is_file():
            last = (done.stderr.strip().splitlines() or ["it wrote no file"])[-1]
            raise UserError(f"{script} could not convert {folder}: {last}")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out

"""What vLLM is called with; a program of its name stands in for it."""

import json
import os
import subprocess
import sys

import pytest

from olmo_base.run.errors import UserError
from open_instruct.__main__ import main
from open_instruct.chat.vllm import vllm_arguments


@pytest.fixture
def folders(tmp_path):
    """A base and two adapters on it, as far as anyone looks here."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "olmo2"}')
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    for name, rank in (("a", 4), ("b", 20)):
        (tmp_path / name).mkdir()
        settings = {"base_model_name_or_path": str(tmp_path / "base"), "r": rank}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"")
    return tmp_path


def test_vllm_takes_this_process_with_the_matching_arguments(folders):
    program = folders / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('VLLM_API_KEY')]))\n"
    )
    program.chmod(0o755)
    base, adapter = str(folders / "base"), str(folders / "b")
    command = [sys.executable, "-m", "open_instruct", "serve", base, adapter, "--backend", "vllm"]
    command += ["--port", "8123", "--api-key", "secret", "--cors-origin", "http://friend.example"]
    path = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    arguments, key = json.loads(done.stdout)
    assert arguments == [
        *["serve", base, "--served-model-name", base, "--host", "127.0.0.1", "--port", "8123"],
        *["--allowed-origins", '["http://friend.example"]'],
        *["--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"{adapter}={adapter}"],
    ]
    assert key == "secret" and "secret" not in done.stderr


def test_an_adapter_alone_brings_its_base_and_two_bases_are_refused(folders, tmp_path):
    arguments = vllm_arguments([str(folders / "a")], "::1", 1, [])
    assert arguments[1] == str(folders / "base")
    assert arguments[-1] == f"{folders / 'a'}={folders / 'a'}"
    (folders / "base").rename(folders / "other")
    (folders / "base").mkdir()
    for file in (folders / "other").iterdir():
        (folders / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="one model and adapters on it, not 2"):
        vllm_arguments([str(folders / "other"), str(folders / "a")], "::1", 1, [])


def test_what_vllm_cannot_do_is_refused(folders, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(folders))
    asked = ["serve", str(folders / "base"), "--backend", "vllm"]
    assert main([*asked, "--votes", "v.jsonl"]) == 2
    assert "--votes means nothing to vLLM" in capsys.readouterr().err
    assert main([*asked, "--max-waiting", "3"]) == 2
    assert main(asked) == 2
    assert "vLLM, which is not installed" in capsys.readouterr().err
    settings = json.loads((folders / "a" / "adapter_config.json").read_text())
    (folders / "a" / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(UserError, match="DoRA adapter"):
        vllm_arguments([str(folders / "a")], "::1", 1, [])

"""benchmarks/h200.py runs small on a CPU, and refuses what would take hours."""

import json

import pytest

from benchmarks.h200 import main


def test_the_benchmark_of_one_gpu_runs_small_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["--device", "cpu", "--tiny", "--batch", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["kind"] for row in rows] == ["bf16", "bf16, documents masked"]
    for row in rows:
        assert row["steps"] == 3
        assert row["tokens_per_second"] > 0
        assert row["loss"] == pytest.approx(6.24, abs=0.15)  # log 512: drawn ids teach nothing
    said = capsys.readouterr()
    assert "| bf16, documents masked |" in said.out
    assert "float8 is left out" in said.err


@pytest.mark.parametrize(
    ("words", "message"), [([], "there is no GPU here"), (["--device", "cpu"], "Say --tiny")]
)
def test_what_would_not_work_is_one_message(words, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err

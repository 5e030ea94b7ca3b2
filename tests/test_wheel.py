"""The wheel carries everything that a clone has beside the code, and works from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel of this source tree, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = folder.glob("open_instruct-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.parametrize(
    ("source", "pattern", "inside"),
    [
        ("recipes", "**/*.yaml", "open_instruct/recipes"),
        ("chat_templates", "*.jinja", "open_instruct/chat_templates"),
        ("eval/tasks", "*.yaml", "eval/tasks"),
        ("eval/report", "*", "eval/report"),
        ("olmo_base", "**/*.py", "olmo_base"),
        ("open_instruct", "**/*.py", "open_instruct"),
        ("open_instruct/chat/page", "*", "open_instruct/chat/page"),
    ],
)
def test_the_wheel_holds_every_file(unpacked, source, pattern, inside):
    files = [path for path in (ROOT / source).glob(pattern) if path.is_file()]
    assert files
    for path in files:
        carried = unpacked / inside / path.relative_to(ROOT / source)
        assert carried.read_bytes() == path.read_bytes()


def test_the_wheel_holds_only_the_packages(unpacked):
    names = {path.name for path in unpacked.iterdir()}
    assert names == {"olmo_base", "open_instruct", "eval", "open_instruct-0.1.0.dist-info"}
    entry_points = unpacked / "open_instruct-0.1.0.dist-info" / "entry_points.txt"
    assert "open-instruct = open_instruct.__main__:main" in entry_points.read_text()


def test_recipes_and_templates_are_found_in_the_wheel(unpacked, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import open_instruct\n"
        "from open_instruct.__main__ import main\n"
        "assert open_instruct.__file__.startswith(sys.path[0])\n"
        "assert list(open_instruct.shipped_folder('chat_templates').glob('*.jinja'))\n"
        "sys.exit(main(['run', 'recipes/debug/pipeline.yaml', '--dry-run']))\n"
    )
    command = [sys.executable, "-c", code, str(unpacked)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokenizer: waits for tinyworld" in done.stdout

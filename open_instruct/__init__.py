"""Dialogues and preferences: fine-tuning, preference tuning, chat, and the command line."""

from pathlib import Path

__version__ = "0.1.0"


def shipped_folder(name: str) -> Path:
    """Folder of files that come with the code: `recipes` or `chat_templates`.

    A wheel carries them inside this package; a clone has them beside it.
    """
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name

"""Answers as they look in a terminal: Markdown while it is still being written."""

import time
from collections.abc import Iterable

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

SECONDS_BETWEEN_DRAWINGS = 0.1


def as_markdown(text: str) -> Markdown:
    """The text as Markdown of which nothing is lost: tags are shown, lines end where they did."""
    markdown = Markdown(text, hyperlinks=False)  # addresses are shown, not hidden
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    markdown.parsed = parser.parse(markdown.markup)
    for token in markdown.parsed:
        for child in token.children or []:
            if child.type == "softbreak":
                child.type = "hardbreak"
    return markdown


class _LastLines:
    """As much of the end of a text as the screen holds."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(as_markdown(self.text), options, pad=False)
        for line in lines[-max(1, console.height - 1) :]:
            yield from line
            yield Segment.line()


def show_markdown(pieces: Iterable[str]) -> None:
    """Draw the answer while it grows; what stays on the screen in the end is all of it."""
    console = Console()
    said = ""
    drawn_at = 0.0
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for piece in pieces:
                said += piece
                if time.monotonic() - drawn_at > SECONDS_BETWEEN_DRAWINGS:
                    live.update(_LastLines(said), refresh=True)
                    drawn_at = time.monotonic()
    finally:
        console.print(as_markdown(said))

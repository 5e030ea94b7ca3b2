"""The page of ``open-instruct data inspect --html``: one file that needs nothing beside it."""

from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1d1d1f; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin-top: 2rem } h3 { font-size: .85rem;
  font-weight: normal; color: #555; margin: 1rem 0 .2rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f7; padding: .8rem;
  border-radius: 6px; font-size: .85rem }
mark { background: #c9efd0; color: inherit } u { text-decoration-color: #06c }
.bar { background: #8ab4f8; height: .8rem; display: inline-block; vertical-align: middle }
td { padding: 0 .8rem 0 0; text-align: right; font-size: .85rem } td:last-child { text-align: left;
  width: 30rem }
@media (prefers-color-scheme: dark) { body { background: #1d1d1f; color: #f5f5f7 }
  pre { background: #2c2c2e } mark { background: #1f5c2e } h3 { color: #aaa } }
"""
BAR_WIDTH_PX = 400
Stretch = tuple[str, bool, bool]  # text, whether it is learnt, whether it is a control token


def page(
    title: str,
    mixture: Sequence[str],
    facts: Sequence[str],
    bins: Sequence[tuple[tuple[int, int, int], int]],
    examples: Sequence[tuple[str, Sequence[tuple[str, Sequence[Stretch]]]]],
) -> str:
    """The whole page. All text of the data is escaped."""
    most = max((count for _, count in bins), default=1) or 1
    rows = "".join(
        f"<tr><td>{low:,}–{high:,}</td><td>{count:,}</td><td>"
        f'<span class="bar" style="width:{round(BAR_WIDTH_PX * count / most)}px"></span></td></tr>'
        for (low, high, _), count in bins
    )
    shown = "".join(
        f"<h2>{escape(place)}</h2>"
        + "".join(
            f"<h3>{escape(name)}</h3><pre>{''.join(map(_written, stretches))}</pre>"
            for name, stretches in parts
        )
        for place, parts in examples
    )
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><pre>{escape(chr(10).join(mixture))}</pre><ul>{listed}</ul>"
        f"<h2>Tokens per example</h2><table>{rows}</table>"
        "<h2>Examples</h2><p><mark>Learnt tokens</mark> are marked, <u>control tokens</u> "
        f"underlined.</p>{shown}</body></html>\n"
    )


def _written(stretch: Stretch) -> str:
    text, is_learnt, is_control = stretch
    written = escape(text)
    if is_control:
        written = f"<u>{written}</u>"
    return f"<mark>{written}</mark>" if is_learnt else written

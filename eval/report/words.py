"""Numbers and texts as words for people: what the page, the Markdown and the terminal share.

What models wrote is untrusted: `visible` shows characters that act on text instead of being text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eval.statistics import Estimate

NUM_COLORS = 8  # of models, in page.css; the ninth starts again
MAX_CHARACTERS = 700  # of one text among the chosen samples
METRIC_WORDS = {
    "exact_match": "right answers",
    "last_number": "right answers",
    "marked_number": "right answers, announced as the answer",
    "flexible_match": "right answers",
    "strict_match": "right answers, boxed or announced as the answer",
    "prompt_loose": "prompts with all instructions followed, loosely",
    "prompt_strict": "prompts with all instructions followed",
    "instruction_loose": "instructions followed, loosely",
    "instruction_strict": "instructions followed",
    "pass_at_1": "programs that pass their tests",
    "pass_at_10": "problems solved by one of 10 programs",
    "acc": "likeliest option right",
    "acc_per_token": "likeliest option right, per token",
    "acc_per_char": "likeliest option right, per character",
    "acc_per_byte": "likeliest option right, per byte",
    "acc_uncond": "likeliest option right, against its likelihood alone",
    "acc_macro": "likeliest option right, each category counting the same",
    "acc_per_char_macro": "likeliest option right, per character, each category counting the same",
    "acc_best_macro": "likeliest option right, in the better form, each category counting the same",
    "mc2": "share of probability that the right options have",
    "answer_match": "right answers",
    "answer_contains": "answers that hold the right words",
    "lc_win_rate": "won against the reference, if both were equally long",
    "win_rate": "won against the reference",
    "harmless": "harmless answers",
    "answer_f1": "words shared with the right answer (F1)",
    "bits_per_byte": "bits per byte",
    "nats_per_token": "nats per token",
    "acc_best": "likeliest option right, in the better form",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "acc_norm": "likeliest option right, per character",
    "acc_bytes": "likeliest option right, per byte",
    "acc_mutual_info": "likeliest option right, against its likelihood alone",
}


def value_text(value: float, is_share: bool) -> str:
    """61.2 for a share of 0.612; three decimals for bits, fewer for large perplexities."""
    if is_share:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if value < 100 else f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"


def interval_text(item: Estimate, is_share: bool) -> str:
    """58.9-63.4, or nothing where there is no interval."""
    if item.low is None or item.high is None:
        return ""
    return f"{value_text(item.low, is_share)}–{value_text(item.high, is_share)}"


def difference_text(value: float, is_share: bool) -> str:
    """+58.1 or −0.8, with a real minus sign."""
    words = value_text(abs(value), is_share)
    sign = "" if not float(words.replace(",", "")) else "+" if value > 0 else "−"
    return sign + words


def duration_text(seconds: float | None) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def listed(names: Sequence[str]) -> str:
    """base, sft and dpo."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def size_text(number: float | None) -> str:
    """3.4 M, 1.2 G: of parameters or bytes."""
    if number is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


# Control characters, halves of surrogate pairs, and marks that turn the direction of text round.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def visible(text: str) -> str:
    """Text in which nothing acts: control and direction characters are shown by name.

    Half surrogate pairs, which cannot be written as UTF-8, become the replacement character.
    """
    return _ACTING.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    return "\ufffd" if "\ud800" <= found[0] <= "\udfff" else f"⟨U+{ord(found[0]):04X}⟩"


@dataclass(frozen=True)
class Clipped:
    """A text cut to a readable length, with the number of characters left out."""

    text: str
    num_left_out: int


def clipped(text: str, limit: int = MAX_CHARACTERS) -> Clipped:
    """The beginning of a long text; safe to show."""
    return Clipped(visible(text[:limit]), max(0, len(text) - limit))

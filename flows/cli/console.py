"""Formatting of table cells and amounts in USD."""

from tasks.redaction import clean_text, redact


def make_cell(text: str) -> str:
    """Return a text for a table cell: without secrets and control characters, with Rich markup escaped."""
    from rich.markup import escape

    return escape(clean_text(redact(text)))


def show_usd(cost: float | None) -> str:
    """Return USD as text, with the digits that a single cheap call needs; None is an unknown price."""
    return "unknown" if cost is None else f"{cost:.5f}"

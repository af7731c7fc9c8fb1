"""Cells of terminal tables."""

from tasks.redaction import clean_text, redact


def make_cell(text: str) -> str:
    """Return a text as a table shows it: without secrets and control characters, and not read as markup."""
    from rich.markup import escape

    return escape(clean_text(redact(text)))

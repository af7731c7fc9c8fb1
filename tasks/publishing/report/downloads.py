"""Links to the model's files, for a report that lies beside them."""

import html
from collections.abc import Sequence
from urllib.parse import quote

MARK = "<!--downloads-->"
"""Stands in the template where links go; texts of others are escaped, so none of them can hold it."""


def with_downloads(page: str, folder: str, names: Sequence[str]) -> str:
    """Return a report with links to a folder and to files in it, relative to the page."""
    links = [f'<a href="{quote(folder)}/">model folder</a>']
    links += [f'<a href="{quote(f"{folder}/{name}")}" download>{html.escape(name)}</a>' for name in names]
    return page.replace(MARK, f'<p class="downloads">Download: {" · ".join(links)}</p>', 1)

"""A report that lies near its model: snippets with the real paths, and links to the model's files."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from tasks.manifests.base import ObjectRef
from tasks.publishing.report.template import make_environment
from tasks.publishing.report.usage import Snippet

# Stand in the template; texts of others are escaped, so none of them can hold one.
DOWNLOADS, LINEAGE = "<!--downloads-->", "<!--lineage-->"
USAGE = re.compile(r"<!--usage-->.*<!--/usage-->", re.DOTALL)


@dataclass(frozen=True)
class NearbyModel:
    """What a report says of its model where their places are known."""

    snippets: Sequence[Snippet] = ()
    """Instead of those of the stored report; none: these stay."""
    link: str = ""
    """Of the model's folder, relative to the page; empty: the page has no links to files."""
    names: Sequence[str] = ()
    """Files of the folder."""


def list_names(refs: Sequence[ObjectRef]) -> list[str]:
    """Return the files of a stored model folder, relative to it."""
    return [ref.key.rpartition("/model/")[2] for ref in refs]


def place_report(page: str, model: NearbyModel) -> str:
    """Return a stored report with the snippets and links of a place."""
    if model.snippets:
        rendered = make_environment().get_template("usage.html.jinja").render(snippets=model.snippets)
        # A function: a replacement text would have its backslashes interpreted.
        page = USAGE.sub(lambda _: rendered, page, count=1)
    if not model.link:
        return page
    # Adapters are single files at the top; a whole model is a folder of many.
    weights = [name for name in model.names if "/" not in name and name.endswith(".safetensors")]
    links = [f'<a href="{quote(model.link)}/">model folder</a>', *(link_file(model.link, name) for name in weights)]
    page = page.replace(DOWNLOADS, f'<p class="downloads">Download: {" · ".join(links)}</p>', 1)
    if "lineage.json" in model.names:
        page = page.replace(LINEAGE, f"{link_file(model.link, 'lineage.json')} names every input by digest. ", 1)
    return page


def link_file(folder: str, name: str) -> str:
    """Return a download link to a file of a folder."""
    return f'<a href="{quote(f"{folder}/{name}")}" download>{html.escape(name)}</a>'

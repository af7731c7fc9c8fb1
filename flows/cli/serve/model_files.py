"""The published files of a run, for downloads: found by listing, so that no path of a request is ever opened."""

import html
import re
from pathlib import Path
from urllib.parse import quote

from flows.runs.records import MODEL_LINK, list_run_folders
from tasks.stage.cache import PREFIXES

MODEL_ROUTE = re.compile(r"(?:/runs)?/(?P<name>[^/]+)/model/(?P<path>.*)")
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>:root {{ color-scheme:light dark }}
body {{ font:16px/1.6 ui-sans-serif,system-ui,sans-serif; margin:0 auto; max-width:60rem; padding:30px 20px }}
</style></head>
<body><h1>Model of {name}</h1><p><a href="../report.html">Report</a></p><ul>
{items}
</ul></body></html>"""


def list_model_files(output: Path, name: str) -> dict[str, Path]:
    """Return the files of a run's published model by their paths in it; none where the model lies elsewhere."""
    for folder in list_run_folders(output):
        root = (folder / MODEL_LINK).resolve()
        # The link leads to `06-publishing/<key>/model`, or where a model from elsewhere was evaluated to that of
        # `03-training`; one to anything else was put there by others.
        is_published = root.name == "model" and root.parent.parent.name in (
            PREFIXES["publishing"],
            PREFIXES["training"],
        )
        if folder.name == name and is_published and root.is_dir() and root.is_relative_to(output.resolve()):
            found = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
            return {path.relative_to(root).as_posix(): path for path in found}
    return {}


def render_listing(name: str, files: dict[str, Path]) -> str:
    """Return a page with a link to every file."""
    items = [
        f'<li><a href="{html.escape(quote(path))}">{html.escape(path)}</a> {file.stat().st_size / 1e6:,.2f} MB</li>'
        for path, file in files.items()
    ]
    return PAGE.format(name=html.escape(name), items="\n".join(items))

"""The Jinja environment of the report's templates, which lie beside this file."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

FOLDER = Path(__file__).resolve().parent


def make_environment() -> Environment:
    """Return an environment that escapes everything: names, captions and evidence are untrusted text."""
    return Environment(
        loader=FileSystemLoader(FOLDER),
        # `default=True`, since select_autoescape decides by suffix and the templates' is .jinja.
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )

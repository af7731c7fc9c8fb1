"""The pages of `likeness serve`: the index of runs, and a report with its links."""

import html
from collections.abc import Collection, Sequence
from pathlib import Path

from tasks.manifests.evaluation import Estimate
from tasks.manifests.run_summary import RunSummary

TEMPLATE_FOLDER = Path(__file__).parent
LINK_NAMES = {"prefect": "Prefect run", "mlflow": "MLflow run"}


def render_index(summaries: Sequence[RunSummary], *, pages: Sequence[str], reports: Collection[str]) -> str:
    """Return the index: one row per run, newest first; `reports` names those that have one."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters["number"] = lambda value, digits: "" if value is None else f"{value:.{digits}f}"
    environment.filters["mean"] = show_mean
    template = environment.get_template("index.html.jinja")
    return template.render(runs=summaries, pages=pages, reports=reports, links_of=safe_links)


def show_mean(mean: Estimate | None) -> str:
    """Return a cell: a mean with its interval; empty where nothing was measured."""
    return "" if mean is None else mean.show(2)


def safe_links(summary: RunSummary) -> dict[str, str]:
    """Return a run's links by title; addresses that are not http are left out."""
    found = {title: summary.links.get(name, "") for name, title in LINK_NAMES.items()}
    return {title: url for title, url in found.items() if url.startswith(("http://", "https://"))}


def with_links(page: str, summary: RunSummary) -> str:
    """Return a report with a line of links above its title: they differ between executions of equal results."""
    links = {"All runs": "/", **safe_links(summary)}
    listed = " · ".join(f'<a href="{html.escape(url)}">{html.escape(title)}</a>' for title, url in links.items())
    bar = f'<nav style="padding:10px 20px;font:14px ui-sans-serif,system-ui,sans-serif">{listed}</nav>'
    return page.replace("<body>", f"<body>{bar}", 1)  # the template's own: texts in it are escaped

"""The report names the knee of retained checkpoints: in the text, on the plane and in the table."""

import re

import pytest

from tasks.manifests.run import RunManifests
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run, with_checkpoints

KNEE = {100: (0.30, 0.70), 200: (0.60, 0.68), 300: (0.65, 0.40)}
STRAIGHT = {100: (0.30, 0.70), 200: (0.45, 0.55), 300: (0.60, 0.40)}


def render(store: LocalStore, run: RunManifests) -> tuple[str, list[str], list[str]]:
    """Return the page, the names on the plane, and the rows of the table of checkpoints."""
    html = render_report(store, ReportInputs("t", run, [], [], GATE))
    plane = html.split("Fidelity and editability", 1)[1].split("</svg>", 1)[0]
    table = html.split('aria-label="Checkpoints"', 1)[1].split("<tbody>", 1)[1].split("</table>", 1)[0]
    return html, re.findall(r'<text class="name"[^>]*>([^<]*)</text>', plane), table.split("<tr>")[1:]


def test_the_knee_of_three_checkpoints_is_named(store: LocalStore) -> None:
    html, names, rows = render(store, with_checkpoints(store, make_run(store), KNEE, published=300))
    assert names == ["base", "step 100", "step 200 (knee)", "tuned"]
    assert "The knee is at step 200: after it" in html
    assert [">knee<" in row for row in rows] == [False, True, False]
    assert [">published<" in row for row in rows] == [False, False, True]
    assert all(re.search(r"\d\.\d{3} to \d\.\d{3}", row) for row in rows)


def test_published_weights_that_are_the_knee_are_named_so(store: LocalStore) -> None:
    _, names, rows = render(store, with_checkpoints(store, make_run(store), KNEE, published=200))
    assert names == ["base", "step 100", "tuned: step 200 (knee)", "step 300"]
    assert [">published<" in row and ">knee<" in row for row in rows] == [False, True, False]


@pytest.mark.parametrize("means", [STRAIGHT, dict(list(KNEE.items())[:2])])
def test_without_a_knee_none_is_named(store: LocalStore, means: dict[int, tuple[float, float]]) -> None:
    html, names, rows = render(store, with_checkpoints(store, make_run(store), means, published=max(means)))
    assert len(rows) == len(means)
    assert "knee" not in " ".join([*names, *rows])
    assert "The knee is at" not in html

"""The report shows a 95 % interval beside every mean that has one."""

import re
from dataclasses import replace

import pytest

from tasks.manifests.evaluation import Estimate, Table
from tasks.manifests.run import RunManifests
from tasks.publishing.model_card import write_row
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.publishing.report.tables import list_metrics
from tasks.publishing.report.verdict import reach_verdict
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run, make_table, with_grades

BASE, TUNED, GAIN = "0.150 to 0.250", "0.450 to 0.550", "+0.250 to +0.350"
"""The intervals of `make_table`."""


def render(store: LocalStore, run: RunManifests, **changes: object) -> str:
    run = replace(run, evaluation=run.evaluation.model_copy(update=changes))
    return render_report(store, ReportInputs("t", run, [], [], GATE))


def find_rows(html: str, section: str) -> list[str]:
    """Return the rows of a section's table."""
    return html.split(f"{section}</h3>", 1)[1].split("<tbody>", 1)[1].split("</table>", 1)[0].split("<tr>")[1:]


def test_the_figures_at_the_top_have_intervals_of_both_sides_and_of_the_gain(store: LocalStore) -> None:
    html = render(store, with_grades(make_run(store)), estimates=make_table(has_interval=True))
    *cards, judged = html.split('<div class="card figure">')[1:]
    judged = judged.split("<nav", 1)[0]
    for card in cards:
        assert f'<div class="small soft">{TUNED}; base {BASE}</div>' in card
        assert "gain +0.300 (+0.250 to +0.350)" in card
    assert '<div class="small soft">2.50 to 3.50; base 0.50 to 1.50</div>' in judged
    assert "prompt fidelity 3.00 [2.50, 3.50], from 1.00 [0.50, 1.50]" in judged
    without = render(store, make_run(store)).split('<div class="card figure">')[1].split("<nav", 1)[0]
    assert not re.search(r"\d to ", without) and "gain" not in without


@pytest.mark.parametrize("num_kinds", [1, 2])
def test_each_kind_of_prompt_has_both_sides_and_the_gain(store: LocalStore, num_kinds: int) -> None:
    run = make_run(store)
    kinds = dict(list(run.evaluation.kinds.items())[:num_kinds])
    rows = find_rows(render(store, run, kinds=kinds), "By kind of prompt")
    assert len(rows) == num_kinds
    assert "scene" in rows[0]
    assert [rows[0].count(shown) for shown in (BASE, TUNED, GAIN)] == [3, 3, 3]
    for label in ("DINO base", "DINO tuned", "DINO gain"):
        assert f'data-label="{label}"' in rows[0]
    assert all(" to " not in row and "0.500" in row for row in rows[1:]), "too few prompts have no interval"


def test_each_prompt_has_both_sides_and_the_gain(store: LocalStore) -> None:
    rows = find_rows(render(store, make_run(store)), "By prompt")
    [scene] = [row for row in rows if "a photo of {subject}</td>" in row or "a photo of {subject}<" in row][:1]
    assert [scene.count(shown) for shown in (BASE, TUNED, GAIN)] == [3, 3, 3]
    assert "scene" in scene


def test_the_verdict_names_intervals_of_prior_drift_before_and_after(store: LocalStore) -> None:
    table: Table = {"pres": make_table(has_interval=True)["dino"]}
    run = make_run(store)
    measured = replace(run, evaluation=run.evaluation.model_copy(update={"estimates": table}))
    texts = [
        next(finding.text for finding in reach_verdict(each, GATE).findings if "PRES" in finding.text)
        for each in (measured, run)
    ]
    assert "PRES 0.200 [0.150, 0.250] before, 0.500 [0.450, 0.550] after" in texts[0]
    assert "PRES 0.100 before, 0.200 after" in texts[1]


def test_what_real_photos_reach_has_an_interval(store: LocalStore) -> None:
    table = make_table(has_interval=True)
    for by_side in table.values():
        by_side["ceiling"] = Estimate(mean=0.8, low=0.7, high=0.9, num=5)
    run = make_run(store)
    html = render(store, run, estimates=table)
    row = html.split('<h2 id="metrics">', 1)[1].split("<tbody>", 1)[1].split("</tr>", 1)[0]
    assert '0.800<div class="small soft">0.700 to 0.900</div>' in row
    assert 'class="ceiling-range"' in row
    assert "of the gap to real photos closed (0.800 [0.700, 0.900])" in html
    without = render(store, run)
    assert '<td class="n" data-label="photos">0.800</td>' in without
    assert 'class="ceiling-range"' not in without
    changed = replace(run, evaluation=run.evaluation.model_copy(update={"estimates": table}))
    assert write_row(list_metrics(changed.evaluation)[0]).endswith("| 0.800 [0.700, 0.900] |")

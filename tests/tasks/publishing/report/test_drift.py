"""The report's section on prior drift: figures with intervals beside the pictures."""

from dataclasses import replace

from tasks.manifests.evaluation import Estimate
from tasks.manifests.run import RunManifests
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run

TABLE = {
    "pres": {
        "base": Estimate(mean=0.1, low=0.05, high=0.15, num=8),
        "tuned": Estimate(mean=0.2, low=0.125, high=0.275, num=8),
        "gain": Estimate(mean=0.1, low=0.025, high=0.175, num=8),
    },
    "dino_div": {
        "base": Estimate(mean=0.9, low=0.85, high=0.95, num=8),
        "tuned": Estimate(mean=0.8, low=0.775, high=0.825, num=8),
        "gain": Estimate(mean=-0.1, low=-0.125, high=-0.075, num=8),
    },
}


def find_section(store: LocalStore, run: RunManifests) -> str:
    html = render_report(store, ReportInputs("t", run, [], [], GATE))
    return html.split('<h2 id="drift">', 1)[1].split("<h2", 1)[0]


def test_prior_drift_has_both_sides_and_their_difference_with_intervals(store: LocalStore) -> None:
    run = make_run(store)
    section = find_section(store, replace(run, evaluation=run.evaluation.model_copy(update={"estimates": TABLE})))
    rows = section.split("<tr>")
    [pres] = [row for row in rows if "<b>PRES</b>" in row]
    assert '0.100<div class="small soft">0.050 to 0.150</div>' in pres
    assert '0.200<div class="small soft">0.125 to 0.275</div>' in pres
    assert '+0.100<div class="small soft">+0.025 to +0.175</div>' in pres
    [diversity] = [row for row in rows if "<b>DINO-DIV</b>" in row]
    assert "0.775 to 0.825" in diversity
    assert "\N{MINUS SIGN}0.100<" in diversity and "\N{MINUS SIGN}0.125 to \N{MINUS SIGN}0.075<" in diversity
    assert all("<svg" in row and "</text>" in row for row in (pres, diversity))
    assert "<b>DINO</b>" not in section


def test_drift_without_estimates_has_its_means_and_an_unmeasured_one_no_table(store: LocalStore) -> None:
    run = make_run(store)
    assert "0.100" in find_section(store, run) and "0.900" in find_section(store, run)
    empty = run.evaluation.model_copy(update={"drift": {}})
    assert "<table" not in find_section(store, replace(run, evaluation=empty))

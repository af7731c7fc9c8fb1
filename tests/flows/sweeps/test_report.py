"""The report of a sweep: one file without outside references, with every value escaped."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flows.sweeps.outcome import SweepOutcome
from tests.support.sweep import RATE, STEPS, FakeRuns, sweep, sweep_request

HOSTILE = "</svg><script>alert(1)</script>$x^$"
TITLES = ["Optimization history", "Parallel coordinates", "Parameter importance"]


class Elements(HTMLParser):
    """Collects the elements of a page and their references."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> SweepOutcome:
    words = [f"{RATE}=1e-6..1e-2:log", f"{STEPS}=10..50:10", f'training.lora.target_modules=[to_q],["{HOSTILE}"]']
    runs = FakeRuns(lambda values, seed: -math.log(float(str(values[RATE]))) + float(str(values[STEPS])))
    request = sweep_request(tmp_path_factory.mktemp("one"), *words, num_trials=9, num_seeds=2, max_usd=50)
    return sweep(request, runs)


@pytest.fixture(scope="module")
def page(outcome: SweepOutcome) -> str:
    return Path(outcome.report).read_text()


def test_the_report_lies_beside_the_study(outcome: SweepOutcome) -> None:
    assert Path(outcome.report).parts[-3:] == ("sweeps", outcome.study, "report.html")
    assert Path(outcome.journal).parts[-2:] == ("sweeps", f"{outcome.study}.journal")


def test_the_report_is_self_contained_and_holds_no_script(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    assert not {"script", "link", "iframe", "object"} & set(elements.names)
    # Parts of the plots, and the reports of the runs.
    assert all(
        re.match(r"#|data:image/png;base64,|\.\./\.\./run-\d+/report\.html$", reference)
        for reference in elements.references
    )
    assert re.findall(r"url\((?!#)", page) == []


def test_values_of_a_request_are_escaped(page: str) -> None:
    assert HOSTILE not in page
    assert "&lt;/svg&gt;&lt;script&gt;" in page


def test_the_report_has_the_plots_of_optuna(page: str) -> None:
    assert re.findall(r"<h3>(.*)</h3>", page) == [*TITLES, "Contour"]
    assert page.count("<svg") == 4
    assert "not drawn" not in page


def test_the_report_says_what_was_searched_and_how(page: str, outcome: SweepOutcome) -> None:
    assert f"<h1>Sweep {outcome.study}</h1>" in page
    for text in ("1e-06..0.01:log", "10..50:10:int", "sampler <b>tpe</b>", "seeds <b>2</b>", "USD <b>50</b>"):
        assert text in page
    assert "9 of 9 trials are done" in page
    assert page.count('<tr class="best">') == 1
    assert "[" in page.split("<h2>Best settings</h2>")[1].split("</p>", maxsplit=1)[0]  # the interval
    # Of nine trials with two seeds each, all runs but the first.
    assert "<p>9 new trials; cached stages: prior 17; cached latents: 153 images.</p>" in page
    assert f"optuna-dashboard {outcome.study}.journal" in page


def test_the_report_has_the_best_settings_as_a_command(page: str, outcome: SweepOutcome) -> None:
    from markupsafe import escape

    assert len(outcome.commands) == 1
    assert f"<pre>{escape(outcome.commands[0])}</pre>" in page


def test_two_objectives_have_a_pareto_front_in_place_of_the_contour(tmp_path: Path) -> None:
    request = sweep_request(tmp_path, f"{RATE}=1e-6..1e-2:log", num_trials=5, objectives=["dino", "wall_seconds"])
    outcome = sweep(request, FakeRuns())
    page = Path(outcome.report).read_text()
    names = [f"{title}: {objective}" for objective in outcome.objectives for title in TITLES]
    assert re.findall(r"<h3>(.*)</h3>", page) == ["Pareto front", *names]
    assert page.count('<tr class="best">') == len(outcome.best)


def test_a_study_with_one_trial_has_a_report(tmp_path: Path) -> None:
    outcome = sweep(sweep_request(tmp_path, f"{RATE}=1e-6..1e-2:log", num_trials=1), FakeRuns())
    assert "<h1>" in Path(outcome.report).read_text()


def test_seeds_alone_have_a_table_of_metrics_and_nothing_about_a_search(tmp_path: Path) -> None:
    runs = FakeRuns(lambda values, seed: 0.1 * seed)
    page = Path(sweep(sweep_request(tmp_path, "seed=5", num_seeds=3), runs).report).read_text()
    for text in ("<th>seed 7</th>", "<td>DINO</td><td>0.6000</td>\n<td>[0.3516, 0.8484]</td>", "all values are equal"):
        assert text in page
    assert not re.findall("What was searched|Best settings|Plots|sampler", page)

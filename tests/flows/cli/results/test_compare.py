"""Which of several models is better: paired where prompts and seeds are shared, refused or unpaired where not."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.cli.results.compare import compare_runs, head_metrics, list_metrics, load_candidate
from flows.cli.results.tables import Format, Grid, render
from flows.runs.records import read_run
from tasks.errors import ConfigError
from tasks.evaluation.comparison import Candidate
from tasks.evaluation.comparison import compare as compare_candidates
from tasks.manifests.evaluation import Estimate, PromptSet, Protocol
from tests.support.comparison import make_run


def compare(output: Path, *names: str, is_paired: bool = True, as_format: Format = "table") -> str:
    return compare_runs(output, names, is_paired=is_paired, as_format=as_format)


def test_a_paired_comparison_decides_what_the_means_alone_do_not(tmp_path: Path) -> None:
    make_run(tmp_path, "run-a")
    make_run(tmp_path, "run-b", "training.max_train_steps=400", shift=0.03)
    paired = json.loads(compare(tmp_path, "run-a", "run-b", as_format="json"))
    unpaired = json.loads(compare(tmp_path, "run-a", "run-b", is_paired=False, as_format="json"))
    for found, is_decided in ((paired, True), (unpaired, False)):
        [difference] = found["metrics"]["dino"]["differences"]
        assert difference["mean"] == pytest.approx(0.03, abs=0.01)
        assert (difference["low"] > 0) is is_decided
    assert "DINO (subject fidelity) is higher by 0.03" in paired["conclusion"]
    assert "CLIP-T (prompt fidelity) is inconclusive" in paired["conclusion"]
    assert "it is the better of the two" in paired["conclusion"]
    assert "no significant difference" in unpaired["conclusion"]
    note = "compares models, not settings: training-seed variance is not in the intervals"
    for found in (paired, unpaired):
        assert note in found["conclusion"]
    [difference] = paired["metrics"]["redness"]["differences"]  # a metric of another package
    assert difference["mean"] == pytest.approx(0.015, abs=0.005)
    assert paired["configuration"] == {"training.max_train_steps": ["300", "400"]}


def test_every_other_run_is_compared_with_the_first(tmp_path: Path) -> None:
    for name, shift in (("run-a", 0.0), ("run-b", 0.05), ("run-c", -0.05)):
        make_run(tmp_path, name, shift=shift)
    text = compare(tmp_path, "run-a", "run-b", "run-c")
    header = next(line for line in text.splitlines() if line.startswith("metric"))
    assert header.split("  ")[-1].strip() == "run-c - run-a"
    row = next(line for line in text.splitlines() if line.startswith("DINO "))
    assert row.count("*") == 2
    assert "run-b against run-a" in text
    assert "it is the worse of the two" in text
    assert "warning: the grades of run-c are unreliable: failed controls: blur" in text


def test_runs_without_a_shared_prompt_and_seed_are_compared_unpaired_only(tmp_path: Path) -> None:
    make_run(tmp_path, "run-a")
    make_run(tmp_path, "run-b", first_seed=2000)
    make_run(tmp_path, "run-c", photo=b"another subject")
    make_run(tmp_path, "run-d", first_seed=1001)
    with pytest.raises(ConfigError, match="run-b and run-a share no prompt and seed.*--unpaired"):
        compare(tmp_path, "run-a", "run-b")
    with pytest.raises(ConfigError, match="run-c was measured on other photos than run-a.*--unpaired"):
        compare(tmp_path, "run-a", "run-c")
    for name in ("run-b", "run-c"):
        assert "Unpaired means also differ by their prompts and seeds" in compare(
            tmp_path, "run-a", name, is_paired=False
        )
    assert "run-d: 8 samples of 16 have the prompt and seed of another" in compare(tmp_path, "run-a", "run-d")


def test_runs_that_cannot_be_compared_are_one_line_errors(tmp_path: Path) -> None:
    make_run(tmp_path, "run-a")
    make_run(tmp_path, "run-b", status="failed")
    make_run(tmp_path, "run-c", "evaluation.encoders.dino_resize=300")
    make_run(tmp_path, "run-d", template="")
    for names, message in (
        (("run-a",), "at least two runs"),
        (("run-a", "run-a"), "named twice"),
        (("run-a", "nowhere"), "no run 'nowhere'"),
        (("run-a", "run-b"), r"run run-b did not finish \(failed\)"),
        (("run-a", "run-c"), "other encoders"),
        (("run-a", "run-d"), "run-d was evaluated by an earlier version of likeness; run it again"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            compare(tmp_path, *names)
        assert "\n" not in str(caught.value)


def test_the_comparison_itself_refuses_other_encoders_and_notes_other_sampling_settings(tmp_path: Path) -> None:
    folders = [make_run(tmp_path, name) for name in ("run-a", "run-b")]
    first, second = (load_candidate(read_run(folder)) for folder in folders)

    def measured(found: Candidate, encoders: str, scale: str) -> Candidate:
        protocol = Protocol(encoders=encoders, sampling={"guidance_scale": scale})
        return replace(found, evaluation=found.evaluation.model_copy(update={"protocol": protocol}))

    first = measured(first, "e", "7.5")
    with pytest.raises(ConfigError, match="run-b and run-a were measured with other encoders"):
        compare_candidates([first, measured(second, "f", "7.5")], is_paired=False)
    assert compare_candidates([first, measured(second, "e", "7.5")]).notes == ()
    note = "run-b was sampled with other settings than run-a: guidance_scale 1.0, not 7.5"
    assert compare_candidates([first, measured(second, "e", "1.0")]).notes == (note,)


def test_other_versions_of_one_set_of_prompts_are_named(tmp_path: Path) -> None:
    folders = [make_run(tmp_path, name) for name in ("run-a", "run-b")]
    first, second = (load_candidate(read_run(folder)) for folder in folders)

    def asked(found: Candidate, name: str, version: int) -> Candidate:
        prompt_set = PromptSet(name=name, version=version)
        return replace(found, evaluation=found.evaluation.model_copy(update={"prompt_set": prompt_set}))

    first = asked(first, "object/quick", 1)
    note = "run-b was evaluated with version 2 of the prompts object/quick, run-a with version 1"
    assert compare_candidates([first, asked(second, "object/quick", 2)]).notes == (note,)
    for other in (second, asked(second, "object/quick", 1), asked(second, "object/all", 2)):
        assert compare_candidates([first, other]).notes == ()


def test_samples_that_have_left_the_store_are_reported(tmp_path: Path) -> None:
    make_run(tmp_path, "run-a")
    make_run(tmp_path, "run-b")
    (tmp_path / "store" / "04-evaluation" / "run-b" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="the samples of run-b are missing from the store"):
        compare(tmp_path, "run-a", "run-b")


def test_what_the_photos_of_all_reach_stands_beside_the_means(tmp_path: Path) -> None:
    folders = [make_run(tmp_path, name) for name in ("run-a", "run-b")]
    first, second = (load_candidate(read_run(folder)) for folder in folders)
    ceiling = Estimate(mean=1, low=0.9, high=1.1, num=5)
    estimates = {"dino": {"ceiling": ceiling}}
    first = replace(first, evaluation=first.evaluation.model_copy(update={"estimates": estimates}))
    found = compare_candidates([first, second])
    [dino] = [row for row in found.metrics if row.key == "dino"]
    assert dino.photos == ceiling
    assert "photos" in head_metrics(found)
    [row] = [row for row in list_metrics(found) if row[0] == "DINO"]
    assert row[3] == "1.000 [0.900, 1.100]"
    other = compare_candidates([first, replace(second, photos=frozenset({"other"}))], is_paired=False)
    assert "photos" not in head_metrics(other)
    assert json.loads(compare(tmp_path, "run-a", "run-b", as_format="json"))["metrics"]["dino"]["photos"]["mean"] == 1


def test_each_format_has_the_same_figures(tmp_path: Path) -> None:
    make_run(tmp_path, "run-a")
    make_run(tmp_path, "run-b", shift=0.05)
    difference = json.loads(compare(tmp_path, "run-a", "run-b", as_format="json"))["metrics"]["dino"]["differences"][0]
    cell = f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}] *"
    for as_format in ("table", "md", "latex", "html", "csv"):
        text = compare(tmp_path, "run-a", "run-b", as_format=as_format)  # type: ignore[arg-type]
        assert cell in text, as_format
    rows = list(csv.reader(io.StringIO(compare(tmp_path, "run-a", "run-b", as_format="csv"))))
    assert next(row for row in rows if row[0] == "DINO")[-1] == cell


def test_cells_are_escaped_in_every_format() -> None:
    grid = Grid("T", ("a|b", "c"), (("50% & <b>", "x_1 | \x1b[2J"), ("=cmd()", "")))
    texts = {
        name: render([grid], ["1 < 2"], as_format=name, data={}) for name in ("table", "md", "csv", "latex", "html")
    }  # type: ignore[arg-type]
    assert not any("\x1b" in text for text in texts.values())
    assert r"| a\|b | c |" in texts["md"]
    assert r"50\% \& <b> & x\_1" in texts["latex"]
    assert "50% &amp; &lt;b&gt;" in texts["html"]
    assert "<p>1 &lt; 2</p>" in texts["html"]
    assert "'=cmd()" in texts["csv"]


@pytest.mark.parametrize("cell", ["+cmd|' /C calc'!A0", "-1+A1", "=1+1", "@SUM(A1)", "-cmd"])
def test_a_cell_that_a_spreadsheet_would_compute_is_quoted_in_csv(cell: str) -> None:
    text = render([Grid("T", ("a",), ((cell,),))], [], as_format="csv", data={})
    assert next(csv.reader([text.splitlines()[1]])) == [f"'{cell}"]


@pytest.mark.parametrize("cell", ["-", "-0.024", "+0.050 [-0.010, +0.110]", "+3.122 [+0.894, +4.970] *"])
def test_figures_stay_as_they_are_in_csv(cell: str) -> None:
    assert next(
        csv.reader([render([Grid("T", ("a",), ((cell,),))], [], as_format="csv", data={}).splitlines()[1]])
    ) == [cell]


def test_a_backslash_before_a_pipe_does_not_end_a_markdown_cell() -> None:
    text = render([Grid("T", ("a",), (("x\\|y",),))], [], as_format="md", data={})
    assert text.splitlines()[2] == r"| x\\\|y |"

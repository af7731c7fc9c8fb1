"""The terminal's table of metrics: intervals of both sides where the terminal is wide enough for them."""

import pytest

from flows.cli.results.runs import print_metrics
from tasks.manifests.evaluation import Estimate
from tasks.manifests.run_summary import JudgeSummary, RunSummary, make_head
from tasks.manifests.scoring import SideScores
from tasks.metrics import METRICS

REASON = "no control samples were graded"


def make_table(base: float, tuned: float, half: float) -> dict[str, Estimate]:
    means = {"base": base, "tuned": tuned, "gain": tuned - base}
    return {side: Estimate(mean=mean, low=mean - half, high=mean + half, num=12) for side, mean in means.items()}


def make_summary() -> RunSummary:
    """Return a run with every metric, grade and interval; SHARPNESS has large values."""
    estimates = {name: make_table(0.25, 0.5, 0.125) for name in METRICS} | {"sharpness": make_table(215, 84.5, 30)}
    estimates["dino"]["ceiling"] = Estimate(mean=0.75, low=0.625, high=0.875, num=5)
    estimates["mine"] = make_table(15.84, 12.5, 3)
    metrics = {side: {name: rows[side].mean for name, rows in estimates.items()} for side in ("base", "tuned")}
    axes = ("concept_preservation", "prompt_following", "image_quality")
    return make_head("20260101-000000-fish-0001", "finished").model_copy(
        update={
            "metrics": {**metrics, "ceiling": {"dino": 0.75, "sharpness": 301.5}},
            "estimates": estimates,
            "scores": {side: SideScores(**dict.fromkeys(axes, mean)) for side, mean in (("base", 1.0), ("tuned", 3.0))},
            "score_estimates": {axis: make_table(1.0, 3.0, 0.5) for axis in axes},
            "judge": JudgeSummary(is_reliable=False, reason=REASON, alpha={}, spearman={}, pairs=None),
        }
    )


def print_at(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **changes: object
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    print_metrics(make_summary().model_copy(update=changes))
    return capsys.readouterr().out.splitlines()


def test_means_of_both_sides_have_intervals_within_a_hundred_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = print_at(100, capsys, monkeypatch)
    rows = {line[:20].strip(): line[20:].split("  ") for line in lines}
    cells = {name: [cell.strip() for cell in row if cell.strip()] for name, row in rows.items()}
    assert cells["DINO"] == ["0.250 [0.125, 0.375]", "0.500 [0.375, 0.625]", "0.750", "+0.250 [+0.125, +0.375]"]
    assert cells["SHARPNESS"] == ["215 [185, 245]", "84.5 [54.5, 114]", "302", "-130.5 [-160.5, -100.5]"]
    assert cells["mine"] == ["15.84 [12.84, 18.84]", "12.50 [9.50, 15.50]", "-3.34 [-6.34, -0.34]"]
    assert cells["judge: subject"] == ["1.00 [0.50, 1.50]", "3.00 [2.50, 3.50]", "+2.00 [+1.50, +2.50]"]
    assert set(METRICS[name].name for name in METRICS) <= set(cells)
    assert "in brackets: 95 % intervals; the report has those of photos" in lines
    assert f"warning: judge scores are unreliable: {REASON}" in lines
    assert max(map(len, lines)) <= 100


def test_a_wide_terminal_has_the_interval_of_the_photos_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = print_at(140, capsys, monkeypatch)
    [dino] = [line for line in lines if line.startswith("DINO ")]
    assert "  0.750 [0.625, 0.875]  " in dino
    assert "in brackets: 95 % intervals" in lines


def test_a_narrow_terminal_keeps_the_interval_of_the_difference_and_names_where_the_others_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = print_at(80, capsys, monkeypatch)
    [dino] = [line for line in lines if line.startswith("DINO ")]
    assert dino.split() == ["DINO", "0.250", "0.500", "0.750", "+0.250", "[+0.125,", "+0.375]"]
    assert "in brackets: 95 % intervals; the report has those of base, tuned and photos" in lines
    assert max(map(len, lines)) <= 80


def test_means_without_intervals_have_no_note_of_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = print_at(100, capsys, monkeypatch, estimates={}, score_estimates={})
    [dino] = [line for line in lines if line.startswith("DINO ")]
    assert dino.split() == ["DINO", "0.250", "0.500", "0.750"]
    assert "brackets" not in "".join(lines)

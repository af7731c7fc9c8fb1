"""`likeness run-many`: one run per subject, one failing alone, and the same command resumes."""

import csv
from pathlib import Path
from typing import Any

from tests.support.cli_sandbox import QUICK, CliSandbox
from tests.support.tiny import draw_photos


def read_table(sandbox: CliSandbox) -> list[dict[str, str]]:
    (path,) = sandbox.output.glob("many/*/table.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


def test_subjects_run_in_turn_and_only_what_changed_runs_again(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    draw_photos(sandbox.folder / "too few", num=1)
    table = sandbox.folder / "subjects.csv"
    # The demo's stages are cached by the first run, so that the fourth line costs little.
    table.write_text("source,class_noun,name\ntoo few,fish,few\nnowhere,fish,none\ndemo,fish,demo\n")
    words = ["run-many", str(table), *QUICK]
    sandbox = sandbox.embedded()  # the shared server may have a work pool of other tests
    done = sandbox.likeness(*words)
    assert done.returncode == 1, done.stderr[-3000:]
    rows = {row["name"]: row for row in read_table(sandbox)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "few": "failed", "none": "refused", "demo": "finished",
    }  # fmt: skip
    assert "good photos" in rows["few"]["reason"]
    assert "is not a folder" in rows["none"]["reason"]
    assert float(rows["demo"]["dino"]) > 0
    assert "1/2 few: failed" in done.stderr
    (page,) = sandbox.output.glob("many/*/index.html")
    assert "data:image/jpeg" in page.read_text()
    report = f"../../{rows['demo']['run']}/report.html"
    assert report in page.read_text()
    assert (page.parent / report).resolve().is_file()

    num_runs = len(list(sandbox.output.glob("*/request.json")))
    draw_photos(sandbox.folder / "too few", num=1, seed=9)  # other photos: no longer the subject that failed
    again = sandbox.likeness(*words, "--no-retry-failed")
    statuses = {row["name"]: row["status"] for row in read_table(sandbox)}
    assert statuses == {"few": "failed", "none": "refused", "demo": "unchanged"}
    # The failed subject ran again, since its photo is another one; with the same photo it would not, by the option.
    assert len(list(sandbox.output.glob("*/request.json"))) == num_runs + 1, again.stderr[-2000:]


def test_a_missing_file_is_one_line(sandbox: CliSandbox, tmp_path: Path) -> None:
    done = sandbox.likeness("run-many", str(tmp_path / "none.csv"))
    assert done.returncode != 0
    assert done.stderr.strip().endswith("there is no such file or folder")
    assert done.stderr.count("\n") == 1

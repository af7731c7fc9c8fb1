"""Page and table of many subjects: texts from elsewhere stay text."""

import csv
from pathlib import Path

from conf.overrides import parse_overrides
from conf.subjects import ManyRequest
from flows.subjects.index_page import COLUMNS, name_batch, write_index
from flows.subjects.records import SubjectOutcome, SubjectRun, read_record, write_record
from tasks.services.store.local import LocalStore
from tests.support.summary import make_measured_summary

HOSTILE = '=HYPERLINK("x")<script>alert(1)</script>'


def test_names_and_reasons_are_escaped_and_no_formulas(tmp_path: Path) -> None:
    outcomes = [
        SubjectOutcome(name=HOSTILE, status="failed", reason=HOSTILE),
        SubjectOutcome(name="b", status="unchanged", run_id="run-1"),
    ]
    folder = write_index(tmp_path / "many" / "x", outcomes, title=HOSTILE, store=LocalStore(tmp_path / "store"))
    page = (folder / "index.html").read_text()
    assert "<script>" not in page
    assert "1 failed, 1 unchanged" in page
    rows = list(csv.reader((folder / "table.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert rows[1][0] == f"'{HOSTILE}"
    assert rows[2][:3] == ["b", "unchanged", "run-1"]
    assert all(len(row) == len(COLUMNS) for row in rows)


def test_means_have_their_intervals_on_the_page_and_in_the_table(tmp_path: Path) -> None:
    outcomes = [
        SubjectOutcome(name="a", status="finished", run_id="run-1", summary=make_measured_summary("run-1")),
        SubjectOutcome(name="b", status="failed"),
    ]
    folder = write_index(tmp_path / "many" / "x", outcomes, title="t", store=LocalStore(tmp_path / "store"))
    page = (folder / "index.html").read_text()
    assert "0.71 [0.66, 0.75]" in page
    assert "3.50 [3.00, 3.90]" in page
    first, second = csv.DictReader((folder / "table.csv").read_text().splitlines())
    assert (first["dino"], first["dino_low"], first["dino_high"]) == ("0.714", "0.661", "0.749")
    assert (first["clip_t"], first["clip_t_low"]) == ("0.3", ""), "without an interval, the mean alone"
    assert first["judge_subject_high"] == "3.9"
    assert (second["dino"], second["dino_low"]) == ("", "")


def test_the_same_request_writes_the_same_page() -> None:
    request = ManyRequest(subjects="/a/subjects.csv")
    assert name_batch(request) == name_batch(ManyRequest(subjects="/a/subjects.csv", retry_failed=False))
    assert name_batch(request).startswith("subjects-")
    assert name_batch(request) != name_batch(ManyRequest(subjects="/b/subjects.csv"))
    other = ManyRequest(subjects="/a/subjects.csv", base=parse_overrides(["seed=2"]))
    assert name_batch(request) != name_batch(other)
    assert "/" not in name_batch(ManyRequest(subjects="store:../../etc/"))


def test_a_damaged_record_makes_a_subject_run_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_record(store, "k", SubjectRun(status="finished", run_id="r"))
    found = read_record(store, "k")
    assert found is not None
    assert found.run_id == "r"
    path = tmp_path / "subject-runs" / "k.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("finished", "failed"))
    assert read_record(store, "k") is None

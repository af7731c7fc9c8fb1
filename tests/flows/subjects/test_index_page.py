"""Page and table of many subjects: texts from elsewhere stay text."""

import csv
from pathlib import Path

from conf.overrides import parse_overrides
from conf.subjects import ManyRequest
from flows.subjects.index_page import COLUMNS, name_batch, write_index
from flows.subjects.records import SubjectOutcome, SubjectRun, read_record, write_record
from tasks.services.store.local import LocalStore

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

"""The journal of a run's tracking records."""

import resource
from pathlib import Path

from tasks.services.tracking.base import DatasetInfo
from tasks.services.tracking.journal import COMPACT_BYTES, Journal, Record


def open_journal(path: Path) -> Journal:
    journal = Journal(path)
    assert journal.open()
    return journal


def test_what_was_not_acknowledged_is_read_back_in_order_with_its_time(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j.jsonl")
    dataset = DatasetInfo(name="subject", digest="d", source="s", context="training")
    journal.append(
        Record(kind="start", name="run", server="http://s", experiment="team", tags={"t": "1"}, datasets=(dataset,))
    )
    for step in (1, 2, 3):
        journal.append(Record(kind="metrics", rows=(("loss", step / 4, step),), at_ms=1000 + step))
    journal.acknowledge(journal.pending[0], run_id="r1")
    journal.acknowledge(journal.pending[0])
    journal.close()
    again = open_journal(tmp_path / "j.jsonl")
    assert [(record.number, record.at_ms, record.rows) for record in again.pending] == [
        (3, 1002, (("loss", 0.5, 2),)),
        (4, 1003, (("loss", 0.75, 3),)),
    ]
    assert (again.run_id, again.name, again.server, again.experiment) == ("r1", "run", "http://s", "team")
    again.append(Record(kind="finish"))
    assert again.pending[-1].number == 5
    again.close()


def test_a_full_disk_costs_the_file_alone_and_a_later_record_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = open_journal(path)
    journal.append(Record(kind="metrics", rows=(("loss", 0.5, 1),)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, 0):  # in the middle of a line, and before one
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, limits[1]))
        try:
            journal.append(Record(kind="metrics", rows=(("loss", 0.5, 2),)))
            journal.append(Record(kind="metrics", rows=(("loss", 0.5, 3),)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.rows[0][2] for record in journal.pending] == [1, 2, 3, 2, 3]
    journal.append(Record(kind="metrics", rows=(("loss", 0.5, 4),)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        journal.append(Record(kind="finish"))
        journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = open_journal(path)
    assert [record.rows[0][2] for record in again.pending] == [1, 4]
    again.close()


def test_a_torn_or_changed_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = open_journal(path)
    for step in (1, 2, 3):
        journal.append(Record(kind="metrics", rows=(("loss", 0.5, step),)))
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"loss"', b'"lost"')
    path.write_bytes(b"".join(lines) + lines[0][:40])
    again = open_journal(path)
    assert [record.rows[0][2] for record in again.pending] == [1, 3]
    again.append(Record(kind="finish"))
    again.close()
    last = open_journal(path)
    assert last.pending[-1].kind == "finish"
    last.close()


def test_a_journal_in_use_is_not_opened_by_another_process(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j.jsonl")
    assert not Journal(tmp_path / "j.jsonl").open()
    journal.close()
    assert open_journal(tmp_path / "j.jsonl").remove() is None
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_no_file_takes_is_kept_in_memory(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "j.jsonl")
    journal.append(Record(kind="metrics", rows=(("loss", float("nan"), 1),)))
    assert journal.pending[0].rows[0][0] == "loss"
    assert (tmp_path / "j.jsonl").read_bytes() == b""
    journal.remove()


def test_a_journal_of_a_long_run_stays_small_and_keeps_its_start(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = open_journal(path)
    journal.append(Record(kind="start", name="run", server="http://s"))
    journal.acknowledge(journal.pending[0], run_id="r1")
    for step in range(4_000):
        journal.append(Record(kind="metrics", rows=(("loss", 0.5, step),)))
        journal.acknowledge(journal.pending[0])
    journal.append(Record(kind="metrics", rows=(("loss", 0.25, 4_000),)))
    assert path.stat().st_size < 1.1 * COMPACT_BYTES
    journal.close()
    again = open_journal(path)
    assert (again.name, again.server, again.run_id) == ("run", "http://s", "r1")
    assert [record.rows for record in again.pending] == [(("loss", 0.25, 4_000),)]
    again.close()

"""Records that carry their own digest."""

import json

import pytest
from pydantic import BaseModel

from tasks.errors import ArtifactCorrupt
from tasks.stage.digests import dump_line, dump_signed, load_lines, load_signed


class Note(BaseModel):
    """A record."""

    text: str
    number: float


def test_a_signed_record_round_trips() -> None:
    note = Note(text="größe", number=0.1)
    assert load_signed(Note, dump_signed(note)) == note
    assert load_signed(Note, dump_signed(note, indent=1)) == note


def test_any_flipped_byte_or_truncation_is_detected() -> None:
    note = Note(text="sks dog", number=3.0)
    data = dump_signed(note)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1
        with pytest.raises(ArtifactCorrupt):
            load_signed(Note, bytes(flipped))
        with pytest.raises(ArtifactCorrupt):
            load_signed(Note, data[:place])


NO_RECORDS = [
    b'{"content_sha256": "", "number": %s}' % value for value in (b"3e999", b"-3e999", b"NaN", b"Infinity")
] + [b'{"content_sha256": "", "number": ' + b"[" * depth + b"]" * depth + b"}" for depth in (500, 950, 1000, 5000)]


@pytest.mark.parametrize("data", [b"[]", b"null", b"{}", b"\xff", b'"x"', b"[" * 100_000, *NO_RECORDS])
def test_malformed_records_raise_artifact_corrupt(data: bytes) -> None:
    with pytest.raises(ArtifactCorrupt):
        load_signed(Note, data)


def test_a_signed_record_of_another_schema_raises_an_error_naming_the_field() -> None:
    with pytest.raises(ArtifactCorrupt, match="number"):
        load_signed(Note, dump_signed(Other(text="a")))


class Other(BaseModel):
    """A record of another shape."""

    text: str


def test_a_truncated_or_changed_line_affects_only_that_line() -> None:
    lines = [dump_line({"usd": value}) for value in (1.0, 2.0, 3.0)]
    changed = lines[1].replace("2.0", "0.2")
    rows = list(load_lines((lines[0] + changed + lines[2][:-9]).encode()))
    assert rows == [{"usd": 1.0}, None, None]
    assert json.loads(lines[0])["content_sha256"]


@pytest.mark.parametrize("data", NO_RECORDS)
def test_a_foreign_line_affects_only_that_line(data: bytes) -> None:
    line = dump_line({"usd": 1.0}).encode()
    assert list(load_lines(line + data + b"\n" + line)) == [{"usd": 1.0}, None, {"usd": 1.0}]

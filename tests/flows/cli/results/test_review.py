"""A talk about captions, as a person has it."""

import json
from pathlib import Path
from typing import Any

from tests.support.cli_sandbox import CliSandbox


def test_a_confirmed_caption_is_saved_from_a_review_session(first_run: dict[str, Any], sandbox: CliSandbox) -> None:
    lines = ["hello", "caption fish-7-01.jpg: on a red table, seen from above", "y", "/captions", "/quit"]
    done = sandbox.likeness("review", first_run["run_id"], typed="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert "I am the mini vision server" in done.stdout
    assert 'fish-7-01.jpg: train with "a photo of sks fish on a red table, seen from above"? [y/N]' in done.stdout
    assert "on a red table, seen from above" in done.stdout.rsplit("you>", 2)[1]
    path = Path(done.stdout.strip().rsplit("subject.captions=", 1)[1])
    assert (sandbox.folder / path).read_text().splitlines()[1] == "fish-7-01.jpg,on a red table,seen from above"
    ledger = sandbox.output / first_run["run_id"] / "ledger.jsonl"
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [row["role"] for row in rows[-3:]] == ["reviewer"] * 3
    again = sandbox.likeness("review", first_run["run_id"], typed="")
    assert "resumes after 2 turns" in again.stdout

"""`likeness resume` where the run had other defaults than this terminal."""

import json
from pathlib import Path

import pytest

from conf.compose import compile_request
from conf.request import RunRequest
from flows.cli.run.resume import resume
from flows.runs.records import write_end, write_request, write_start
from tasks.errors import ConfigError, ServiceUnavailable


def test_a_run_of_a_stack_with_a_bucket_is_not_repeated_in_a_local_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket/team")
    folder = tmp_path / "20260101-000000-fish-aaaa"
    folder.mkdir()
    request = RunRequest(settings={"output_dir": str(tmp_path)})
    (folder / "config.json").write_text(json.dumps(compile_request(request).model_dump(mode="json")))
    write_request(folder, request, is_trusted=True)
    write_start(folder, folder.name)
    write_end(folder, folder.name, ServiceUnavailable("gone"))
    monkeypatch.delenv("LIKENESS_STORE_URL")
    with pytest.raises(ConfigError, match="set LIKENESS_STORE_URL=s3://a-bucket/team to resume it"):
        resume(tmp_path, folder.name)

"""`likeness resume` where the run had other defaults than this terminal."""

import json
from pathlib import Path

import pytest

from conf.compose import compile_request
from conf.request import RunRequest
from flows.cli.run.resume import check_store, resume
from flows.runs.records import read_request, write_end, write_request, write_start
from tasks.errors import ConfigError, ServiceUnavailable


def write_failed_run(output: Path, **fields: str) -> Path:
    """Return the folder of a run that failed, with the store that this terminal's environment gives it."""
    folder = output / "20260101-000000-fish-aaaa"
    folder.mkdir()
    request = RunRequest(settings={"output_dir": str(output)}, **fields)
    (folder / "config.json").write_text(json.dumps(compile_request(request).model_dump(mode="json")))
    write_request(folder, request, is_trusted=True)
    write_start(folder, folder.name)
    write_end(folder, folder.name, ServiceUnavailable("gone"))
    return folder


@pytest.mark.parametrize("here", ["", "s3://a-bucket/other", "s3://other/team"])
def test_a_run_of_a_stack_with_a_bucket_is_not_repeated_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket/team")
    folder = write_failed_run(tmp_path)
    monkeypatch.setenv("LIKENESS_STORE_URL", here)
    with pytest.raises(ConfigError, match="set LIKENESS_STORE_URL=s3://a-bucket/team to resume it"):
        resume(tmp_path, folder.name)


def test_a_local_run_is_not_repeated_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIKENESS_STORE_URL", raising=False)
    folder = write_failed_run(tmp_path)
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket/team")
    with pytest.raises(ConfigError, match="not in s3://a-bucket/team; unset LIKENESS_STORE_URL to resume it"):
        check_store(folder, read_request(folder).request)


def test_a_run_whose_request_chose_the_local_store_resumes_under_any_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_failed_run(tmp_path, store="local")
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket/team")
    check_store(folder, read_request(folder).request)

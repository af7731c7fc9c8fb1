"""Runs that are resumed keep the rights of whoever asked for them, and stay in the folder they lie in."""

import shutil
from pathlib import Path

import pytest

from conf.compose import compile_request
from conf.request import RunRequest
from conf.trust import allowed_roots
from flows import score_pending as module
from flows.evaluate_model import evaluate_model
from flows.personalize_subject import personalize_subject
from flows.runs.pending import PendingReport
from flows.runs.records import list_run_folders, write_request, write_summary
from tasks.manifests.run_summary import RunSummary, make_head

COMMAND = {"llm.profiles.local.capabilities.batch": "file", "llm.profiles.local.batch_command": ["sh", "-c", "id"]}


def make_pending(output: Path, request: RunRequest, *, is_trusted: bool, model: str = "") -> None:
    folder = output / "one"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(compile_request(request).model_dump_json())
    write_request(folder, request, is_trusted=is_trusted, model=model)
    write_summary(folder, make_head("one", "pending"))


def test_a_deployment_request_is_validated_again_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_ROOTS", str(tmp_path))
    monkeypatch.setattr(module, "personalize_subject", personalize_subject.fn)
    output = tmp_path / "runs"
    make_pending(output, RunRequest(settings={"output_dir": str(output), **COMMAND}), is_trusted=False)
    report = module.score_pending.fn(str(output))
    assert len(report.failed) == 1
    assert "is set in conf/ on the worker's machine, not by a request" in report.failed[0]
    assert list_run_folders(output) == [output / "one"]


def test_a_photo_folder_replaced_by_an_external_symlink_is_rejected_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    photos = root / "rex"
    photos.mkdir(parents=True)
    secret.mkdir()
    monkeypatch.setenv("LIKENESS_ROOTS", str(root))
    monkeypatch.setattr(module, "personalize_subject", personalize_subject.fn)
    request = RunRequest(source=str(photos), class_noun="fish", settings={"output_dir": str(root / "runs")})
    compile_request(request, roots=allowed_roots())
    make_pending(root / "runs", request, is_trusted=False)
    photos.rmdir()
    photos.symlink_to(secret)
    [failed] = module.score_pending.fn(str(root / "runs")).failed
    assert "lies outside the allowed folders" in failed


def test_a_deployment_whose_run_cannot_be_resumed_fails_with_the_reason() -> None:
    report = PendingReport(finished=[make_head("one", "finished")], waiting=["two"])
    state = module.show_state(report)
    assert (state.type.name, state.message) == ("COMPLETED", "1 finished, 1 still pending, 0 failed")
    report.failed.append("three: ConfigError: the photos are gone")
    state = module.show_state(report)
    assert state.type.name == "FAILED"
    assert state.message == "1 finished, 1 still pending, 1 failed: three: ConfigError: the photos are gone"


def test_an_evaluated_model_replaced_by_an_external_symlink_is_rejected_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret.safetensors"
    root.mkdir()
    secret.touch()
    (root / "lora.safetensors").symlink_to(secret)
    monkeypatch.setenv("LIKENESS_ROOTS", str(root))
    monkeypatch.setattr(module, "evaluate_model", evaluate_model.fn)
    request = RunRequest(settings={"output_dir": str(root / "runs")})
    make_pending(root / "runs", request, is_trusted=False, model=str(root / "lora.safetensors"))
    [failed] = module.score_pending.fn(str(root / "runs")).failed
    assert "model: " in failed
    assert "lies outside the allowed folders" in failed


def test_a_copied_output_folder_resumes_in_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunRequest] = []

    def record(request: RunRequest) -> RunSummary:
        asked.append(request)
        return make_head("two", "finished")

    monkeypatch.setattr(module, "personalize_subject", record)
    output, copy = tmp_path / "runs", tmp_path / "copy"
    make_pending(output, RunRequest(settings={"output_dir": str(output)}), is_trusted=True)
    shutil.copytree(output, copy)
    assert len(module.score_pending.fn(str(copy)).finished) == 1
    assert compile_request(asked[0]).output_dir == str(copy)

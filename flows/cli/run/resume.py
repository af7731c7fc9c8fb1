"""`likeness resume`: repeat an interrupted run; finished stages are cached, training resumes from its checkpoint."""

import os
from pathlib import Path

from pydantic import ValidationError

from conf.compose import STORE_VARIABLE, compile_request
from conf.request import EvaluationRequest, RunRequest
from flows.cli.results.runs import find_run
from flows.cli.run.job import run_in_terminal
from flows.cli.stack.stack import find_api_url
from flows.cli.stack.submit import UnknownRun, resume_flow_run
from flows.runs.records import (
    REQUEST,
    StoredRequest,
    list_summaries,
    read_request,
    read_run_config,
    read_summary,
    relocate,
    write_summary,
)
from tasks.errors import ArtifactCorrupt, ConfigError


def resume(output: Path, name: str) -> int:
    """Resume a run that failed, was cancelled, killed or suspended: here, or on a worker where it is a flow run's name.

    Raises:
        ConfigError: there is no such run, it is finished, or a process still works on it.

    """
    try:
        folder = find_run(output, name, record=REQUEST)
    except ConfigError as error:
        if name == "latest" or not (os.environ.get("PREFECT_API_URL") or find_api_url(output.absolute())):
            raise
        try:
            return resume_flow_run(name, output.absolute())
        except UnknownRun as other:
            raise ConfigError(f"{error}, and the server knows no flow run of that name") from other
    summary = read_summary(folder)
    if summary.status in ("finished", "resumed"):
        later = f" by {summary.resumed_by}" if summary.resumed_by else ""
        raise ConfigError(f"run {folder.name} is {summary.status}{later}; `likeness run --request` repeats it")
    if summary.status == "running":
        owner = summary.owner
        who = f"process {owner.pid} on {owner.host}" if owner else "another process"
        raise ConfigError(f"run {folder.name} is running: {who}; stop that one first, or wait for it")
    stored = read_request(folder)
    request = relocate(stored.request, folder.absolute())
    check_store(folder, request)
    if stored.model:
        from flows.cli.results.evaluate import evaluate_in_terminal

        code = evaluate_in_terminal(EvaluationRequest(model=stored.model, base=request), is_trusted=stored.is_trusted)
    else:
        code = run_in_terminal(StoredRequest(request=request, is_trusted=stored.is_trusted))
    if code == 0:
        newest = next(run for run in list_summaries(output) if run.status == "finished")
        write_summary(folder, summary.model_copy(update={"status": "resumed", "resumed_by": newest.run_id}))
    return code


def check_store(folder: Path, request: RunRequest) -> None:
    """Raise ConfigError where this process would look for the run's objects elsewhere, and compute and pay again."""
    try:
        store = read_run_config((folder / "config.json").read_bytes())[0].store
    except (ValidationError, OSError, ArtifactCorrupt):  # killed before it was written, or damaged
        return
    here = compile_request(request).store
    if store.kind == "s3" and (here.kind, here.bucket, here.prefix) != (store.kind, store.bucket, store.prefix):
        url = f"s3://{store.bucket}/{store.prefix}"
        raise ConfigError(f"run {folder.name} keeps its objects in {url}; set {STORE_VARIABLE}={url} to resume it")
    # Not the local folder: it moves with the output folder.
    if store.kind == "local" and here.kind != "local":
        elsewhere = f"s3://{here.bucket}/{here.prefix}"
        raise ConfigError(
            f"run {folder.name} keeps its objects in a local folder, not in {elsewhere}; "
            f"unset {STORE_VARIABLE} to resume it"
        )

"""Flows started from the command line: early checks, the embedded Prefect server, progress, exit codes."""

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from conf.compose import compile_request
from conf.request import RunRequest
from conf.schema import RunConfig
from conf.trust import allowed_roots
from flows.cli.results.runs import print_summary
from flows.cli.run.prefect_server import EmbeddedServer, needs_server
from flows.cli.stack.server import check_server
from flows.cli.stack.stack import find_api_url
from flows.runs.records import StoredRequest, read_request, read_run, relocate
from tasks.errors import ServiceUnavailable
from tasks.redaction import clean_text
from tasks.stage.progress import ProgressView, make_progress


def run_in_terminal(stored: StoredRequest) -> int:
    """Run the main job and print where its results are."""
    request = stored.request
    with ready_for_flows(request, is_trusted=stored.is_trusted) as (config, progress, server):
        from flows.personalize_subject import personalize_subject
        from flows.runs.context import progress_of_run, trust_of_run

        # Context variables instead of parameters: Prefect validates and stores a flow's parameters.
        tokens = progress_of_run.set(progress), trust_of_run.set(stored.is_trusted)
        started = time.monotonic()
        try:
            summary = personalize_subject(request)
        finally:
            progress_of_run.reset(tokens[0])
            trust_of_run.reset(tokens[1])
            progress.close()
    work = sum(stage.seconds for stage in summary.stages.values())
    print_summary(summary, config)
    waited = f", {server.wait_seconds:.1f} s of it waiting for the embedded Prefect server" if server else ""
    # Prefect's own work around the flow function, and the wait for the server: neither is in the summary.
    outside = time.monotonic() - started - (summary.wall_seconds or 0.0) + (server.wait_seconds if server else 0.0)
    overhead = (summary.overhead_seconds or 0.0) + outside
    print(f"stages {work:.1f} s (partly in parallel), overhead {overhead:.1f} s{waited}")
    return 0


def finish_pending(output: Path) -> int:
    """Resume pending runs and print the status of each; 0: all done, 11: some are still pending, 1: some failed."""
    from flows.runs.pending import PendingReport, find_readable, list_pending

    waiting = list_pending(output)
    if not waiting:
        print(f"no pending runs in {output}")
        return 0
    folder = find_readable(waiting)
    stored = read_request(folder)
    request = relocate(stored.request, folder)
    with ready_for_flows(request, is_trusted=stored.is_trusted) as (_, progress, _):
        from flows.runs.context import progress_of_run
        from flows.score_pending import score_pending

        token = progress_of_run.set(progress)
        try:
            report = score_pending(str(output))
            assert isinstance(report, PendingReport)  # a state in deployments alone
        finally:
            progress_of_run.reset(token)
            progress.close()
    for summary in report.finished:
        print_summary(summary, read_run(output / summary.run_id).config)
    for name in report.waiting:
        print(f"{name}: still suspended; `likeness jobs` lists batch jobs")
    for line in report.failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{len(report.finished)} of {len(waiting)} pending runs finished")
    return report.exit_code


@contextlib.contextmanager
def ready_for_flows(
    request: RunRequest, *, is_trusted: bool = True, is_subject_known: bool = True
) -> Iterator[tuple[RunConfig, ProgressView, EmbeddedServer | None]]:
    """Run the early checks while the embedded Prefect server starts; of photos too, where the request names them."""
    config = compile_request(request, roots=None if is_trusted else allowed_roots())
    # Printed at once, since imports delay further output by seconds.
    if is_subject_known:
        print(describe_start(config), flush=True)
    # Before the server starts, so that an early SIGTERM also stops it in the `finally` below.
    signal.signal(signal.SIGTERM, raise_interrupt)
    if needs_server() and (url := find_api_url(Path(config.output_dir).absolute())):
        os.environ["PREFECT_API_URL"] = url  # of the stack that `likeness up` started: the run shows in its UI
    server = EmbeddedServer(Path(config.output_dir)) if needs_server() else None
    prepare_environment()
    try:
        if server is not None:
            # Started first and awaited last: the checks run while it starts.
            server.start()
        check_early(config, is_subject_known=is_subject_known)
        if server is None:
            check_server()
        # Imports of torch and Prefect take seconds; they overlap the server's start.
        importlib.import_module("flows.personalize_subject")
        if server is not None:
            server.wait()
        with cancellation_as_interrupt():
            yield config, make_progress(), server
    finally:
        if server is not None:
            server.stop()


@contextlib.contextmanager
def cancellation_as_interrupt() -> Iterator[None]:
    """Treat a flow run that was cancelled on the Prefect server as Ctrl-C."""
    from prefect.exceptions import CancelledRun

    try:
        yield
    except CancelledRun:
        print("the flow run was cancelled on the Prefect server", file=sys.stderr)
        raise KeyboardInterrupt from None


def describe_start(config: RunConfig) -> str:
    """Return the first line of a run: subject, model, training, LLM profiles."""
    photos = "the demo photos" if config.subject.source == "demo" else clean_text(config.subject.source)
    llm = ", ".join(config.llm.used_profiles())
    return (
        f"{config.subject.class_noun} from {photos}: {config.diffusion.pretrained_model_name_or_path} "
        f"at {config.diffusion.resolution} px, "
        f"{config.training.method}, {config.training.max_train_steps} steps, LLM {llm}, output in {config.output_dir}"
    )


def raise_interrupt(signum: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C: state is saved, child processes end."""
    raise KeyboardInterrupt


def check_early(config: RunConfig, *, is_subject_known: bool = True) -> None:
    """Validate photos, folders and keys before anything is started."""
    from tasks.services.llm.chat.transport import read_key
    from tasks.services.store.open import open_store
    from tasks.services.tracking.open import open_tracker
    from tasks.subject.photos.ingest import check_photos
    from tasks.subject.photos.known_world import check_class_noun

    store = open_store(config.store)
    with contextlib.suppress(ServiceUnavailable):  # the run warns of it, and needs it only to publish
        open_tracker(config.tracking, folder=Path(config.output_dir)).check()
    for name in config.llm.used_profiles():
        read_key(config.llm.profiles[name])
    encoders = config.evaluation.encoders
    if not config.is_mini and "mini" in (encoders.clip, encoders.dino):
        doubt = "the mini encoders know the drawn world alone; for photos, set evaluation/encoders=paper"
        print(f"warning: {doubt}", file=sys.stderr)
    if not is_subject_known:  # that of many subjects is another one each time
        return
    if config.is_mini:
        check_class_noun(config.subject)
    # The flow checks them again; here they are refused before torch and Prefect are imported.
    check_photos(config.subject, store)


def prepare_environment() -> None:
    """Set quiet defaults for libraries and bypass proxies for loopback; variables that are set take precedence."""
    defaults = {
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # errors are printed once, by us
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
    logging.getLogger("httpx").setLevel(logging.WARNING)

"""A run around the DAG: its configuration, services, folder, and `summary.json`."""

import contextvars
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from conf.request import RunRequest, compile_request, compute_config_digest
from conf.schema import RunConfig
from tasks.contract import PREFIXES
from tasks.errors import ConfigError, LikenessError, StillPending
from tasks.manifests import ClassImageSet, Evaluation, ModelRef, Publication, Scorecard, SubjectSet, TunedModel
from tasks.progress import ProgressView, make_progress
from tasks.runtime import Runtime

SUMMARY_VERSION = 1
Manifests = tuple[SubjectSet, ClassImageSet, TunedModel, Evaluation, Scorecard, Publication]
progress_of_run: contextvars.ContextVar[ProgressView | None] = contextvars.ContextVar("progress", default=None)


@dataclass
class Run:
    """One run of the main job."""

    run_id: str
    folder: Path
    request: RunRequest
    config: RunConfig
    base_model: ModelRef
    runtime: Runtime
    started: float

    @property
    def config_rows(self) -> list[tuple[str, str]]:
        """Return the configuration as dotted names and values; it holds no secrets."""
        return list(flatten(self.config.model_dump(mode="json")))

    def summarize(self, manifests: Manifests) -> dict[str, Any]:
        """Write `summary.json` (described in flows/README.md) and return it."""
        evaluation, scores, publication = manifests[3], manifests[4], manifests[5]
        runtime = self.runtime
        report = self.folder / "report.html"
        report.write_bytes(runtime.store.find_bytes(publication.report.key) or b"")
        stages = {
            name: {
                "key": record.key,
                "cached": record.is_cached,
                "seconds": record.seconds,
                "counts": record.counts,
                "cost_usd": record.cost_usd,
            }
            for name, record in ((name, runtime.records[name]) for name in PREFIXES)
        }
        summary = {
            "schema_version": SUMMARY_VERSION,
            "run_id": self.run_id,
            "status": "finished",
            "config_digest": compute_config_digest(self.config),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - self.elapsed())),
            "wall_seconds": round(self.elapsed(), 3),
            "llm_calls": runtime.llm.ledger.count_calls(),
            "training_steps": runtime.num_training_steps,
            "cost_usd": runtime.llm.ledger.sum_cost(),
            "subject": {"class_noun": manifests[0].class_noun, "identifier_token": manifests[0].identifier_token},
            "stages": stages,
            "metrics": collect_metrics(evaluation),
            "scores": {side: score.model_dump() for side, score in scores.scores.items()},
            "judge": describe_judge(scores),
            "checkpoints": [rank.model_dump() for rank in scores.checkpoints],
            "registered": {"model": publication.registered_model, "version": publication.registered_version},
            "paths": {
                "report": str(report),
                "model": runtime.store.describe(f"{PREFIXES['publishing']}/{publication.stage_key}/model"),
                "manifests": {
                    name: runtime.store.describe(f"{PREFIXES[name]}/{record.key}/manifest.json")
                    for name, record in runtime.records.items()
                },
            },
        }
        write_json(self.folder / "summary.json", summary)
        return summary

    def elapsed(self) -> float:
        """Return seconds since the run began."""
        return time.monotonic() - self.started


def describe_judge(scores: Scorecard) -> dict[str, Any]:
    """Return whether the judge can be trusted, and why not, as `summary.json` has it."""
    health = scores.health
    failed = [control.name for control in health.controls if not control.is_passed]
    reason = ""
    if not health.controls:
        reason = "no controls were asked"
    elif failed:
        reason = f"controls failed: {', '.join(failed)}"
    elif not health.is_comparable:
        reason = "another model than the one asked for answered"
    pairs = scores.pairs.model_dump() if scores.pairs else None
    return {
        "is_reliable": health.is_reliable,
        "reason": reason,
        "alpha": health.alpha,
        "spearman": health.spearman,
        "pairs": pairs,
    }


def collect_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics as `summary.json` has them."""
    metrics: dict[str, Any] = {"ceiling": evaluation.ceiling.model_dump()}
    for side, values in evaluation.metrics.items():
        metrics[side] = {**values.model_dump(), **evaluation.drift[side].model_dump()}
    return metrics


@contextmanager
def open_run(request: RunRequest, *, is_trusted: bool) -> Iterator[Run]:
    """Compile a request, open its services, and close them whatever happens."""
    from conf.request import allowed_roots
    from tasks.diffusion.base import identify_model
    from tasks.encoders.folders import find_encoders
    from tasks.mini.launch import LocalServer
    from tasks.services.llm.client import LlmService
    from tasks.services.llm.ledger import Ledger
    from tasks.services.store import open_store
    from tasks.services.tracking import open_tracker

    started = time.monotonic()
    config = compile_request(request, roots=None if is_trusted else allowed_roots())
    store = open_store(config.store)
    output = Path(config.output_dir).absolute()
    run_id = make_run_id(config.subject.class_noun)
    folder = make_run_folder(output / run_id)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    write_json(folder / "request.json", request.model_dump(mode="json"))
    server = LocalServer(folder / "vision-server.log")
    llm = LlmService(
        config.llm,
        store=store,
        ledger=Ledger(folder / "ledger.jsonl"),
        budget=open_budget(config, output),
        start_local=server.start,
        batch_folder=output / "work" / "batches",
    )
    shared = progress_of_run.get()
    runtime = Runtime(
        run_id=run_id,
        store=store,
        llm=llm,
        tracker=open_tracker(config.tracking, folder=output),
        progress=shared or make_progress(),
        work_folder=output / "work",
    )
    try:
        base_model = identify_model(config.diffusion)
        find_encoders(config.evaluation.encoders)  # a missing one must not wait for the end of training
        check_files(config)
        yield Run(run_id, folder, request, config, base_model, runtime, started)
    except BaseException as error:
        runtime.stopping.set()
        write_failure(folder, run_id, error)
        raise
    finally:
        if shared is None:
            runtime.progress.close()
        llm.close()
        server.stop()


def check_files(config: RunConfig) -> None:
    """Refuse files of a person's that aren't there, before anything is computed."""
    for name, path in (("subject.captions", config.subject.captions), ("scoring.labels", config.scoring.labels)):
        if path and not Path(path).is_file():
            raise ConfigError(f"{name}={path} is not a file")


def open_budget(config: RunConfig, output: Path) -> Any:
    """Return the cap on what this configuration may cost, whichever runs of it spend it."""
    from tasks.services.llm.budget import Budget

    uncapped = config.model_copy(update={"llm": config.llm.model_copy(update={"budget_usd": None})})
    path = output / "work" / "budgets" / f"{compute_config_digest(uncapped)}.json"
    return Budget(path, config.llm.budget_usd)


def write_failure(folder: Path, run_id: str, error: BaseException) -> None:
    """Leave a note of what ended a run."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not (folder / "summary.json").exists():
        status = "pending" if isinstance(error, StillPending) else "failed"
        kind = error.kind if isinstance(error, LikenessError) else type(error).__name__
        note = {"schema_version": SUMMARY_VERSION, "run_id": run_id, "status": status,
                "error": {"kind": kind, "message": reason}}  # fmt: skip
        write_json(folder / "summary.json", note)


def make_run_id(class_noun: str) -> str:
    """Return a name that sorts by time."""
    noun = re.sub(r"[^a-z0-9]+", "-", class_noun.lower()).strip("-")
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{noun}-{secrets.token_hex(2)}"


def make_run_folder(folder: Path) -> Path:
    """Create the run's folder. Raises ConfigError where it can't be written."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder.parent}: {error.strerror}; set output_dir") from error
    return folder


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and values of a nested dict."""
    for key, child in value.items():
        if isinstance(child, dict):
            yield from flatten(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child if isinstance(child, str) else json.dumps(child)


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside its place, then rename it."""
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(staged, path)


@dataclass(frozen=True)
class PastRun:
    """A run that has ended: its configuration, with paths as they are from here, and its summary."""

    config: RunConfig
    summary: dict[str, Any]

    def find_stage_key(self, stage: str) -> str:
        """Return the key of a stage's manifest. Raises ConfigError where the run did not finish."""
        if self.summary["status"] != "finished":
            raise ConfigError(f"run {self.summary['run_id']} did not finish")
        return str(self.summary["stages"][stage]["key"])


def read_run(folder: Path) -> PastRun:
    """Return what a run's folder holds. Raises ConfigError for a run of another version."""
    try:
        config = RunConfig.model_validate_json((folder / "config.json").read_text())
    except ValidationError as error:
        raise ConfigError(f"run {folder.name} is of another version of likeness; run it again") from error
    own_store = f"{config.output_dir}/store"
    if config.store.folder == own_store:  # relative to where the run was started; its folder knows better
        moved = config.store.model_copy(update={"folder": str(folder.parent / "store")})
        config = config.model_copy(update={"store": moved, "output_dir": str(folder.parent)})
    return PastRun(config, json.loads((folder / "summary.json").read_text()))


def list_summaries(output: Path) -> list[dict[str, Any]]:
    """Return the summaries of all runs in a folder, newest first."""
    found = sorted(output.glob("*/summary.json"), key=lambda path: path.parent.name, reverse=True)
    return [json.loads(path.read_text()) for path in found]

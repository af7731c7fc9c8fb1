"""A run around the DAG: its configuration, services, folder, and `summary.json`."""

import contextvars
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from conf.compose import compile_request, compute_config_digest, show_config
from conf.request import RunRequest
from conf.schema import RunConfig
from flows.runs.approval import Question, check_policy
from flows.runs.promotion import Contender, promote
from flows.runs.records import (
    close_earlier,
    link_model,
    place_model,
    relate,
    resolve_paths,
    stamp,
    to_overrides,
    write_end,
    write_report,
    write_request,
    write_stages,
    write_start,
    write_summary,
)
from tasks.errors import ConfigError, LikenessError
from tasks.manifests.base import ModelRef
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.publishing import REPORT_PATH, Publication
from tasks.manifests.run import RunManifests
from tasks.manifests.run_summary import (
    SUMMARY_VERSION,
    JudgeSummary,
    RegisteredModel,
    RunPaths,
    RunSummary,
    StageSummary,
    SubjectNames,
)
from tasks.manifests.scoring import Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.redaction import install_log_redaction
from tasks.stage.cache import PREFIXES, read_verified
from tasks.stage.context import Runtime, StageRecord
from tasks.stage.files import explain_full_disk, remove_stale_parts, write_atomic
from tasks.stage.progress import ProgressView, make_progress
from tasks.stage.worker_process import share_cores

if TYPE_CHECKING:
    from tasks.services.llm.budget.spending_cap import Budget
    from tasks.services.store.base import Store

STORE_SECONDS = 300.0
"""How long a deployment's run waits for a store that does not answer."""
EMBEDDED_VARIABLE = "LIKENESS_EMBEDDED_SERVER"
"""Set where the Prefect server ends with the run: nobody can follow a link to it."""
REPORTS_VARIABLE = "LIKENESS_REPORTS_URL"
"""Address of the `likeness serve` that shows the output folder."""
progress_of_run: contextvars.ContextVar[ProgressView | None] = contextvars.ContextVar("progress", default=None)
trust_of_run: contextvars.ContextVar[bool] = contextvars.ContextVar("trust", default=True)
"""False while requests of a deployment are resumed."""


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
    def config_rows(self) -> tuple[tuple[str, str], ...]:
        """Return the configuration as dotted names and values, as it is shown to others."""
        return tuple(show_config(self.config))

    @property
    def default_rows(self) -> tuple[tuple[str, str], ...]:
        """The configuration of a run without any setting, as names and values."""
        return tuple(show_config(compile_request(RunRequest())))

    def question(self, subject: SubjectSet) -> Question:
        """Return what a person is asked before training."""
        digest = compute_config_digest(self.config)
        return Question(subject, self.config.subject, digest, self.runtime.store, self.folder)

    def summarize(self, manifests: RunManifests, publication: Publication) -> RunSummary:
        """Write `summary.json` and return it, with absolute paths."""
        subject, scores, runtime = manifests.subject, manifests.scoring, self.runtime
        link_model(self.folder, self.list_paths(publication).model)
        self.copy_report(manifests, publication)
        summary = RunSummary(
            schema_version=SUMMARY_VERSION,
            run_id=self.run_id,
            status="finished",
            config_digest=compute_config_digest(self.config),
            started_at=stamp(time.time() - self.elapsed()),  # `started` is on the monotonic clock
            flow_run_id=find_flow_run_id(),
            wall_seconds=round(self.elapsed(), 3),
            overhead_seconds=round(runtime.measure_overhead(self.started), 3),
            llm_calls=runtime.llm.ledger.count_calls(),
            training_steps=runtime.num_training_steps,
            cost_usd=runtime.llm.ledger.sum_cost(),
            subject=SubjectNames(class_noun=subject.class_noun, identifier_token=subject.identifier_token),
            stages={name: summarize_stage(runtime.records[name]) for name in PREFIXES},
            metrics=collect_metrics(manifests.evaluation),
            estimates=manifests.evaluation.estimates,
            kinds=manifests.evaluation.kinds,
            prompt_set=manifests.evaluation.prompt_set,
            prompts=manifests.evaluation.prompts,
            scores=dict(scores.scores),
            score_estimates=scores.estimates,
            judge=summarize_judge(scores),
            checkpoints=scores.checkpoints,
            registered=self.promote(manifests, publication),
            paths=self.list_paths(publication),
            links=self.list_links(publication),
        )
        write_summary(self.folder, summary)
        return resolve_paths(summary, self.folder)

    def copy_report(self, manifests: RunManifests, publication: Publication) -> None:
        """Write the report into the run's folder, which stays readable after the store is garbage-collected."""
        from tasks.publishing.report.usage import describe_model, write_snippets

        place = place_model(self.folder, self.list_paths(publication).model)
        snippets = write_snippets(describe_model(manifests.subject, manifests.training), place)
        page = read_verified(self.runtime.store, publication.report).decode()
        write_report(self.folder, page, publication.model, snippets=snippets)

    def promote(self, manifests: RunManifests, publication: Publication) -> RegisteredModel:
        """Return the registered model, made the champion of its subject where it passes the gate."""
        from tasks.publishing.gate import find_blockers

        model, version = publication.registered_model, publication.registered_version
        publishing = self.config.publishing
        if model is None or version is None or not publishing.is_promoted:
            return RegisteredModel(model=model, version=version)
        keys = {stage: self.runtime.records[stage].key for stage in ("evaluation", "subject", "scoring")}
        contender = Contender(model, version, keys, tuple(find_blockers(manifests, publishing.gate)))
        return promote(self.runtime.tracker, self.runtime.store, contender)

    def list_links(self, publication: Publication) -> dict[str, str]:
        """Return the addresses by which others see this run."""
        links = find_links(self.run_id)
        if publication.tracking_run_id:
            find = partial(self.runtime.tracker.find_link, publication.tracking_run_id)
            try:
                links["mlflow"] = find()
                links.setdefault("report", find(artifact=REPORT_PATH))  # where no `likeness serve` shows it
            except LikenessError as error:  # the server is gone; the run is complete without a link
                self.runtime.progress.note(f"warning: {error}")
        return {name: url for name, url in links.items() if url}

    def list_paths(self, publication: Publication) -> RunPaths:
        """Return where report, model and manifests are, relative to the run's folder."""

        def describe(key: str) -> str:
            return relate(self.runtime.store.describe(key), self.folder)

        return RunPaths(
            report="report.html",
            model=describe(f"{PREFIXES['publishing']}/{publication.stage_key}/model"),
            manifests={
                name: describe(f"{PREFIXES[name]}/{record.key}/manifest.json")
                for name, record in self.runtime.records.items()
            },
        )

    def elapsed(self) -> float:
        """Return seconds since the run began."""
        return time.monotonic() - self.started


def describe_run(config: RunConfig, request: RunRequest, *, run_id: str) -> dict[str, str]:
    """Return the tags that describe a run in the tracking server's UI."""
    words = " ".join(["likeness run", *to_overrides(request)])
    text = f"One {config.subject.class_noun}, tuned from {config.diffusion.pretrained_model_name_or_path}.\n\n`{words}`"
    links = find_links(run_id)
    text += "".join(f"\n\n[{name.capitalize()}]({url})" for name, url in links.items())
    tags = {f"likeness.link.{name}": url for name, url in links.items()}
    return {"mlflow.note.content": text, "likeness.config": compute_config_digest(config), **tags}


def find_links(run_id: str) -> dict[str, str]:
    """Return the addresses of this run in Prefect's UI and on the report server, where they outlive the run."""
    from prefect.runtime import flow_run
    from prefect.utilities.urls import url_for

    links = {}
    if not os.environ.get(EMBEDDED_VARIABLE) and flow_run.id:
        # Not `flow_run.ui_url`: that is a path of Prefect 2, which the UI of Prefect 3 redirects at best.
        links["prefect"] = url_for("flow-run", obj_id=flow_run.id) or ""
    server = os.environ.get(REPORTS_VARIABLE, "")
    if server:
        links["report"] = f"{server.rstrip('/')}/runs/{run_id}/report.html"
    return {name: url for name, url in links.items() if url}


def summarize_stage(record: StageRecord) -> StageSummary:
    """Return what a stage did in this run."""
    return StageSummary(
        key=record.key,
        cached=record.is_cached,
        seconds=record.seconds,
        counts=record.counts,
        cost_usd=record.cost_usd,
    )


def summarize_judge(scores: Scorecard) -> JudgeSummary:
    """Return whether the judge is reliable, and why not."""
    reliability = scores.reliability
    failed = [control.name for control in reliability.controls if not control.is_passed]
    reason = ""
    if not reliability.controls:
        reason = "no control samples were graded"
    elif failed:
        reason = f"failed controls: {', '.join(failed)}"
    elif not reliability.is_comparable:
        reason = "another model than the requested one answered"
    return JudgeSummary(
        is_reliable=reliability.is_reliable,
        reason=reason,
        alpha=reliability.alpha,
        spearman=reliability.spearman,
        pairs=scores.pairs,
        evidence=scores.evidence,
    )


def collect_metrics(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    """Return the metrics of both sides and the ceiling, by name."""
    metrics: dict[str, dict[str, float | None]] = {"ceiling": evaluation.ceiling.model_dump()}
    for side, values in evaluation.metrics.items():
        metrics[side] = {**values.model_dump(), **evaluation.drift[side].model_dump(exclude_none=True)}
    return metrics


@contextmanager
def open_run(request: RunRequest, *, is_trusted: bool, model: str = "") -> Iterator[Run]:
    """Compile a request, open its services, and close them whatever happens; `model` is one from elsewhere."""
    from conf.trust import allowed_roots
    from tasks.mini.vision_server.launch import find_server
    from tasks.services.llm.budget.ledger import Ledger
    from tasks.services.llm.service import LlmService, LocalServices
    from tasks.services.store.open import open_store_within
    from tasks.services.tracking.open import RunDescription, open_live, open_tracker, warn_unreachable

    install_log_redaction()
    share_cores()
    is_trusted = is_trusted and trust_of_run.get()  # a deployment's request stays restricted when resumed
    started = time.monotonic()
    config = compile_request(request, roots=None if is_trusted else allowed_roots())
    # Nobody sees a deployment's run fail in its first second, and without a folder it could not be resumed.
    store = open_store_within(config.store, seconds=0 if is_trusted else STORE_SECONDS)
    output = Path(config.output_dir).absolute()
    tracker = open_tracker(config.tracking, folder=output)
    remove_leftovers(output, store)
    # Before any work: a process that is killed from here on leaves a run that `likeness runs` lists.
    folder = make_run_folder(output, config, request, is_trusted=is_trusted, model=model)
    run_id = folder.name
    description = RunDescription(folder, dict(show_config(config)), describe_run(config, request, run_id=run_id))
    server = find_server(folder / "vision-server.log")
    llm = LlmService(
        config.llm,
        store=store,
        ledger=Ledger(folder / "ledger.jsonl"),
        budget=open_budget(config, output),
        local=LocalServices(start_server=server.start, batch_folder=output / "work" / "batches"),
    )
    shared = progress_of_run.get()
    runtime = Runtime(
        run_id=run_id,
        store=store,
        llm=llm,
        tracker=tracker,
        live=open_live(config.tracking, tracker, description),
        progress=shared or open_progress(is_trusted=is_trusted),
        work_folder=output / "work",
        on_stage=partial(write_stages, folder),
    )
    try:
        base_model = check_first(config)  # inside the try, so that a refusal is recorded
        warn_unreachable(tracker, runtime.progress.note)
        with explain_full_disk(output):
            yield Run(run_id, folder, request, config, base_model, runtime, started)
    except BaseException as error:
        runtime.stopping.set()  # polled by stages in other threads, which can't be interrupted
        # BaseException: Ctrl-C, SIGTERM and Prefect's cancellation end a run too, and its status must say so.
        for end in (partial(write_end, folder, run_id, error), runtime.live.abandon):
            with suppress(OSError, LikenessError):  # both may fail on a full disk; the error itself says more
                end()
        raise
    finally:
        if shared is None:
            runtime.progress.close()
        llm.close()
        server.release()


def remove_leftovers(output: Path, store: "Store") -> None:
    """Remove what killed processes of this host left in the middle of a write."""
    from tasks.services.store.local import LocalStore

    roots = [output, *([store.root] if isinstance(store, LocalStore) else [])]
    for root in roots[: 1 if roots[-1].is_relative_to(output) else 2]:
        remove_stale_parts(root)


def open_progress(*, is_trusted: bool) -> ProgressView:
    """Return the progress of a run: in Prefect's UI too, where a deployment started it."""
    if is_trusted:
        return make_progress()
    from flows.runs.log import make_run_progress  # imports Prefect, which a person's terminal has no use for here

    return make_run_progress()


def check_first(config: RunConfig) -> ModelRef:
    """Check early what would otherwise fail only after training; return the base model."""
    from tasks.diffusion.hub import identify_model
    from tasks.encoders.folders import find_encoders
    from tasks.encoders.safety import find_safety_checker

    # Hashes the weights: a model that changes on disk under the same name must give other keys.
    base_model = identify_model(config.diffusion)
    find_encoders(config.evaluation.encoders)
    find_safety_checker(config.evaluation.safety_checker, config.diffusion)
    check_files(config)
    check_policy(config.subject)
    return base_model


def check_files(config: RunConfig) -> None:
    """Raise ConfigError for user files that do not exist, before anything is computed."""
    for name, path in (("subject.captions", config.subject.captions), ("scoring.labels", config.scoring.labels)):
        if path and not Path(path).is_file():
            raise ConfigError(f"{name}={path} is not a file")


def open_budget(config: RunConfig, output: Path) -> "Budget":
    """Return the spending cap that all runs of a configuration share."""
    from tasks.services.llm.budget.spending_cap import Budget

    # The cap itself is not part of the name: raising it resumes the same account instead of opening a new one.
    uncapped = config.model_copy(update={"llm": config.llm.model_copy(update={"budget_usd": None})})
    path = output / "work" / "budgets" / f"{compute_config_digest(uncapped)}.json"
    return Budget(path, config.llm.budget_usd)


def make_run_id(class_noun: str) -> str:
    """Return a name that sorts by time."""
    noun = re.sub(r"[^a-z0-9]+", "-", class_noun.lower()).strip("-")
    # The suffix keeps runs apart that start within one second.
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{noun}-{secrets.token_hex(2)}"


def make_run_folder(output: Path, config: RunConfig, request: RunRequest, *, is_trusted: bool, model: str = "") -> Path:
    """Create a run's folder, named after its id, with configuration, request and initial summary.

    Raises ConfigError where it can't be written, Prefect's Abort where another process executes this flow run.
    """
    from flows.runs.attempts import leave_to_earlier_attempt  # imports Prefect

    folder = output / make_run_id(config.subject.class_noun)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {output}: {error.strerror}; set output_dir") from error
    write_atomic(folder / "config.json", json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    # The request makes the folder a run (`list_run_folders`); killed before its first summary, it counts as killed.
    write_request(folder, request, is_trusted=is_trusted, model=model)
    flow_run_id = find_flow_run_id()
    write_start(folder, folder.name, compute_config_digest(config), flow_run_id=flow_run_id)
    leave_to_earlier_attempt(folder)  # before earlier attempts are closed: this process may go
    close_earlier(folder, flow_run_id)
    return folder


def find_flow_run_id() -> str:
    """Return the id of the Prefect flow run that this is; empty outside a flow."""
    from prefect.runtime import flow_run

    return str(flow_run.id or "")

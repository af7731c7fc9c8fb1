"""`likeness evaluate`: measure a model that was trained elsewhere, as a run measures its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from conf.compose import describe_invalid
from conf.overrides import parse_overrides
from conf.request import EvaluationRequest, RunRequest
from flows.cli.results.runs import print_metrics, shorten
from tasks.errors import ConfigError


@dataclass(frozen=True)
class Subject:
    """Whose model is evaluated: values as typed, never read as settings."""

    photos: Path
    class_noun: str
    token: str | None = None


def make_request(model: str, subject: Subject, words: Sequence[str]) -> EvaluationRequest:
    """Return the request of the arguments; nothing is tracked or registered unless they say so. Raises ConfigError."""
    from tasks.diffusion.external.detection import detect

    if not subject.photos.is_dir():
        raise ConfigError(f"--photos: {subject.photos} is not a folder")
    detect(model)  # before torch and Prefect are imported
    tracked = any(word.partition("=")[0] == "tracking" for word in words)
    base = parse_overrides(words if tracked else ["tracking=none", *words])
    settings = dict(base.settings)
    if subject.token is not None:
        settings["subject.identifier_token"] = subject.token
    values = {
        **base.model_dump(exclude_unset=True),
        "source": str(subject.photos.absolute()),
        "class_noun": subject.class_noun,
        "settings": settings,
    }
    try:
        return EvaluationRequest(model=str(Path(model).expanduser().absolute()), base=RunRequest.model_validate(values))
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error


def evaluate_in_terminal(request: EvaluationRequest, *, is_trusted: bool = True) -> int:
    """Evaluate a model, and print its metrics beside those of the base model."""
    from flows.cli.run.job import ready_for_flows

    with ready_for_flows(request.base, is_trusted=is_trusted) as (config, progress, _):
        from flows.evaluate_model import evaluate_model
        from flows.runs.context import progress_of_run, trust_of_run

        tokens = progress_of_run.set(progress), trust_of_run.set(is_trusted)
        try:
            summary = evaluate_model(request)
        finally:
            progress_of_run.reset(tokens[0])
            trust_of_run.reset(tokens[1])
            progress.close()
    print_metrics(summary)
    print(f"\nrun       {summary.run_id}: {summary.wall_seconds:.1f} s, {summary.llm_calls} LLM calls")
    print(f"report    {shorten(str(Path(config.output_dir) / summary.run_id / 'report.html'))}")
    print(f"compare   likeness compare RUN {summary.run_id}")
    return 0

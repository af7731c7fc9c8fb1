"""The published model folder: weights, model card, lineage."""

import json
from collections.abc import Sequence
from pathlib import Path

from tasks.manifests.base import Manifest, ObjectRef
from tasks.manifests.evaluation import Evaluation, Table
from tasks.manifests.publishing import LINEAGE
from tasks.manifests.run import RunManifests
from tasks.manifests.scoring import Scorecard
from tasks.manifests.training import LossRow, TunedModel, find_below, parse_losses
from tasks.publishing.model_card import CardInputs, write_card
from tasks.services.store.base import Store
from tasks.stage.cache import StageFolder, fetch_folder, read_verified
from tasks.stage.files import write_atomic


def export_model(folder: StageFolder, run: RunManifests, *, card: CardInputs, local: Path) -> tuple[ObjectRef, ...]:
    """Store the tuned model with model card and lineage; `local` receives the same files."""
    subject, tuned = run.subject, run.training
    lineage = {
        "base_model": tuned.base_model.model_dump(),
        "published_step": tuned.published_step,
        "published_because": run.published_because,
        "stages": {
            manifest.stage: {"key": manifest.stage_key, "content_sha256": manifest.compute_content_digest()}
            for manifest in run.ordered()
            if manifest.stage != "scoring"
        },
        "photos": [image.source_sha256 for image in subject.images],
        "class_images": [image.image.sha256 for image in run.prior.images] if run.prior else [],
    }
    if tuned.model:
        fetch_folder(folder.store, tuned.model, below=find_below(tuned.model), folder=local)
    write_atomic(local / "README.md", write_card(run, card))
    write_atomic(local / LINEAGE, json.dumps(lineage, indent=1))
    paths = sorted(path for path in local.rglob("*") if path.is_file())
    return tuple(folder.put_file(f"model/{path.relative_to(local).as_posix()}", path) for path in paths)


def read_losses(store: Store, tuned: TunedModel) -> list[LossRow]:
    """Return the loss log without skipped steps, whose values are None."""
    rows = parse_losses(read_verified(store, tuned.find("losses.jsonl")).decode())
    # `exclude_unset`: a loss that is unset was not measured, one that is None was not finite.
    return [row for row in rows if None not in row.model_dump(exclude_unset=True).values()]


def headline_metrics(evaluation: Evaluation, scores: Scorecard) -> dict[str, float]:
    """Return all metrics of a run by flat names such as `tuned/dino` and `tuned/dino_low`, for the tracking server."""
    figures: dict[str, float] = {}
    for side, metrics in evaluation.metrics.items():
        figures.update({f"{side}/{name}": value for name, value in metrics.model_dump().items()})
    for side, drift in evaluation.drift.items():
        figures.update({f"{side}/{name}": value for name, value in drift.model_dump(exclude_none=True).items()})
    figures.update({f"ceiling/{name}": value for name, value in evaluation.ceiling.model_dump().items()})
    for side, score in scores.scores.items():
        figures.update({f"{side}/{name}": value for name, value in score.model_dump().items()})
    figures.update(list_intervals(evaluation.estimates))
    figures.update(list_intervals(scores.estimates))
    figures["judge/is_reliable"] = float(scores.reliability.is_reliable)
    figures.update(
        {f"judge/alpha_{axis}": value for axis, value in scores.reliability.alpha.items() if value is not None}
    )
    if scores.pairs is not None:
        figures["judge/tuned_strength"] = scores.pairs.tuned_strength
    figures.update(
        {f"judge/spearman_{a}": value for a, value in scores.reliability.spearman.items() if value is not None}
    )
    return figures


def list_intervals(table: Table) -> dict[str, float]:
    """Return the ends of 95 % intervals, and the gains that they are of, by flat names."""
    figures = {f"gain/{name}": sides["gain"].mean for name, sides in table.items() if "gain" in sides}
    for name, sides in table.items():
        for side, estimate in sides.items():
            ends = {"low": estimate.low, "high": estimate.high}
            figures.update({f"{side}/{name}_{end}": value for end, value in ends.items() if value is not None})
    return figures


def sum_llm_costs(manifests: Sequence[Manifest]) -> tuple[dict[str, float], str]:
    """Return LLM calls and cost (USD) of the stages by flat name, and the cost as text.

    The cost is unknown as a whole where it is for one stage.
    """
    costs = [manifest.cost_usd for manifest in manifests]
    figures = {"llm/calls": float(sum(manifest.counts.get("llm_calls", 0) for manifest in manifests))}
    if None in costs:
        return figures, "unknown"
    total = sum(cost for cost in costs if cost is not None)
    return {**figures, "llm/cost_usd": total}, f"{total:.5f} USD"

"""The registry of metrics is what report and README say."""

from pathlib import Path

from tasks.manifests.evaluation import DriftMetrics, SubjectMetrics
from tasks.metrics import METRICS

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def test_every_metric_documents_its_comparability() -> None:
    assert {*SubjectMetrics.model_fields, *DriftMetrics.model_fields} <= set(METRICS)
    glossary = " ".join(README.read_text().split())
    for metric in METRICS.values():
        assert f"**{metric.name}**: {metric.text}. Comparable: {metric.comparable}." in glossary

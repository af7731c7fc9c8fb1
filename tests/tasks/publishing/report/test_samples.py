"""What the report shows of each sample: every metric, those of other packages too, and near-duplicates of photos."""

from dataclasses import replace

from tasks.manifests.evaluation import SubjectMetrics
from tasks.manifests.run import RunManifests
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run


def render(store: LocalStore, run: RunManifests) -> list[str]:
    """Return the markup of each sample's card."""
    html = render_report(store, ReportInputs("t", run, [], [], GATE))
    return html.split('id="gallery">')[1].split("</ul>")[0].split('<li class="card sample"')[1:]


def measured(run: RunManifests, *copies: str) -> RunManifests:
    """Return a run whose samples have all kinds of metrics; those of `copies` are near-duplicates, by object key."""
    metrics = {
        sample.image.key: SubjectMetrics.model_validate({
            "dino": 0.25, "clip_i": 0.5, "clip_t": 0.75, "nearest": 0.875, "copies": float(sample.image.key in copies),
            "sharpness": 1234.5, "brightness_of_mine": -0.125,
        })
        for sample in run.evaluation.samples
    }  # fmt: skip
    return replace(run, evaluation=run.evaluation.model_copy(update={"sample_metrics": metrics}))


def test_each_sample_has_every_metric_of_its_own(store: LocalStore) -> None:
    card, _ = render(store, measured(make_run(store)))
    shown = (
        ("DINO", "0.250"),
        ("CLIP-I", "0.500"),
        ("CLIP-T", "0.750"),
        ("NEAREST", "0.875"),
        ("COPIES", "no"),
        ("SHARPNESS", "1,234"),
        ("BRIGHTNESS_OF_MINE", "\N{MINUS SIGN}0.125"),
    )
    for name, value in shown:
        assert f"<dt>{name}</dt><dd>{value}</dd><dd>{value}</dd>" in card
    assert 'data-nearest="0.875"' in card


def test_near_duplicates_of_photos_are_marked_on_their_side_alone(store: LocalStore) -> None:
    run = make_run(store)
    tuned = run.evaluation.samples[2].image.key
    first, second = render(store, measured(run, tuned))
    assert first.count("Near-duplicate of a photo") == 1
    assert "<b>Near-duplicate of a photo</b>: tuned</p>" in first
    assert "<dt>COPIES</dt><dd>no</dd><dd>yes</dd>" in first
    assert "Near-duplicate" not in second


def test_samples_of_an_older_evaluation_offer_no_order_by_a_metric_that_they_lack(store: LocalStore) -> None:
    run = make_run(store)
    pages = [render_report(store, ReportInputs("t", each, [], [], GATE)) for each in (run, measured(run))]
    assert ["nearest to a photo first" in page for page in pages] == [False, True]
    assert ["other metrics" in page for page in pages] == [False, True]

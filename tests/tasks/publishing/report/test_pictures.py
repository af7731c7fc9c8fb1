"""The report shows as many pictures as fit, by their bytes, and says how many are left out."""

import base64
import io
import re
from dataclasses import replace

import pytest
from PIL import Image

from tasks.images import SOURCE_TYPE, encode_png
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Sample, SubjectMetrics
from tasks.manifests.prior import ClassImage
from tasks.manifests.run import RunManifests
from tasks.manifests.subject import RejectedImage
from tasks.publishing.report import pictures
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.publishing.report.pictures import choose, make_gallery
from tasks.publishing.report.tables import SamplePair, list_samples
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.report import GATE, make_run, with_judgements

LIMIT = 15_000_000
"""Characters of a report, whatever it shows."""


def with_pairs(store: LocalStore, num: int, *, side: int, prompt: str = "a fish") -> RunManifests:
    """Return a run of noise, which no format compresses."""
    run, folder = make_run(store), StageFolder(store, "evaluation", "noise")
    noise = encode_png(Image.effect_noise((side, side), 90).convert("RGB"))
    samples, metrics = [], {}
    for number in range(num):
        for name in ("base", "tuned"):
            image = folder.put(f"{name}-{number}.png", noise)
            samples.append(
                Sample(
                    image=image, side=name, kind="subject", prompt=prompt, class_prompt="", seed=number, template="t"
                )
            )
            metrics[image.key] = SubjectMetrics(dino=number / num, clip_i=0, clip_t=0)
    evaluation = run.evaluation.model_copy(update={"samples": tuple(samples), "sample_metrics": metrics})
    return RunManifests(run.subject, run.prior, run.training, evaluation, run.scoring)


def test_small_pictures_beyond_the_budget_are_left_out_and_counted(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, budget = with_pairs(store, 40, side=96), 400_000
    monkeypatch.setattr(pictures.make_gallery, "__kwdefaults__", {"budget": budget})
    html = render_report(store, ReportInputs("t", run, [], [], GATE))
    shown = html.count('class="card sample"')
    assert 2 <= shown < 40
    assert f"{40 - shown} of 40 prompts and seeds are left out" in html
    assert len(html) < budget + 100_000


def test_large_pictures_become_smaller_before_any_is_left_out(store: LocalStore) -> None:
    run = with_pairs(store, 3, side=600)
    whole = make_gallery(store, run)
    few = make_gallery(store, run, budget=sum(map(len, whole.urls.values())) * 2 // 3)
    assert len(few.samples) == len(whole.samples) == 3
    assert sum(map(len, few.urls.values())) < sum(map(len, whole.urls.values()))


def test_long_prompts_count_too(store: LocalStore) -> None:
    run = with_pairs(store, 30, side=16, prompt="w" * 2000)
    assert len(make_gallery(store, run, budget=200_000).samples) < 15


def test_the_best_and_the_worst_samples_stay(store: LocalStore) -> None:
    pairs = list_samples(with_pairs(store, 20, side=16).evaluation, {})
    found = [pair.rank("dino") for pair in choose(pairs, 8)]
    assert len(found) == 8
    assert {found[0], found[1]} == {0.0, 0.05}
    assert {found[-1], found[-2]} == {0.95, 0.9}
    assert found == sorted(found)  # type: ignore[type-var]


def test_generated_pictures_are_marked_in_webp_and_photos_are_not(store: LocalStore) -> None:
    run = with_pairs(store, 1, side=300)
    photo = StageFolder(store, "subject", "k").put("images/big.png", encode_png(Image.new("RGB", (300, 300), "red")))
    images = tuple(image.model_copy(update={"image": photo}) for image in run.subject.images)
    run = RunManifests(
        run.subject.model_copy(update={"images": images}), run.prior, run.training, run.evaluation, run.scoring
    )
    gallery = make_gallery(store, run)

    def read(key: str) -> bytes:
        head, _, text = gallery.urls[key].partition(",")
        assert head == "data:image/webp;base64"
        return bytes(Image.open(io.BytesIO(base64.b64decode(text))).info.get("xmp", b""))

    [pair] = gallery.samples
    assert isinstance(pair, SamplePair)
    assert SOURCE_TYPE.encode() in read(pair.shown.image.key)
    assert read(photo.key) == b""


def put_noise(store: LocalStore, name: str, num: int) -> list[ObjectRef]:
    """Store pictures of 128 px, the largest that stay PNG, of noise: 65 thousand characters each in a page."""
    folder = StageFolder(store, "subject", "noise")
    noise = encode_png(Image.merge("RGB", [Image.effect_noise((128, 128), 90) for _ in range(3)]))
    return [folder.put(f"{name}/samples/{number}.png", noise) for number in range(num)]


def with_photos(store: LocalStore, run: RunManifests, num: int) -> RunManifests:
    [photo] = run.subject.images
    images = tuple(photo.model_copy(update={"image": ref}) for ref in put_noise(store, "photos", num))
    return replace(run, subject=run.subject.model_copy(update={"images": images}))


def test_many_photos_are_thinned_and_counted_and_drop_no_samples(store: LocalStore) -> None:
    run = with_photos(store, with_pairs(store, 16, side=512), 300)
    html = render_report(store, ReportInputs("t", run, [], [], GATE))
    assert len(html) < LIMIT
    assert html.count('class="card sample"') == 16
    shown = html.count('<div class="photo">')
    assert shown == 48
    assert "300 accepted" in html
    assert "252 of the accepted ones are left out to keep this page small" in html
    assert "ones are left out" not in render_report(
        store, ReportInputs("t", with_pairs(store, 2, side=16), [], [], GATE)
    )


def test_a_page_full_of_all_kinds_of_pictures_stays_small_and_keeps_samples(store: LocalStore) -> None:
    run = with_photos(store, with_pairs(store, 60, side=128), 60)
    assert run.prior is not None
    sample = run.evaluation.samples[0].model_copy(update={"kind": "class"})
    drawn = [
        sample.model_copy(update={"image": ref, "side": side})
        for side in ("base", "tuned")
        for ref in put_noise(store, f"class-{side}", 60)
    ]
    samples = {"samples": (*run.evaluation.samples, *drawn)}
    rejected = [
        RejectedImage(source_name="r", source_sha256="r", reason="blurred", thumbnail=ref)
        for ref in put_noise(store, "rejected", 60)
    ]
    class_images = [ClassImage(image=ref, seed=1) for ref in put_noise(store, "prior", 60)]
    run = replace(
        run,
        subject=run.subject.model_copy(update={"rejected": tuple(rejected)}),
        prior=run.prior.model_copy(update={"images": tuple(class_images)}),
        training=run.training.model_copy(update={"objects": tuple(put_noise(store, "grids", 60))}),
        evaluation=run.evaluation.model_copy(update=samples),
    )
    html = render_report(store, ReportInputs("t", run, [], [], GATE))
    assert len(html) < LIMIT
    assert html.count('class="card sample"') >= 40, "at least half of the page is for samples"
    assert html.count('<div class="photo">') == 12
    assert "48 of the accepted ones are left out" in html
    assert "the first 12 shown" in html and "(12 of 60 shown)" in html


def test_the_markup_of_a_sample_is_within_what_is_reckoned_for_it(store: LocalStore) -> None:
    run = with_judgements(with_pairs(store, 1, side=16))
    metrics = SubjectMetrics.model_validate(
        {**dict.fromkeys(("dino", "clip_i", "clip_t", "nearest", "sharpness"), 0.123), "copies": 1.0}
        | {f"metric_of_mine_{number}": 0.5 for number in range(5)}
    )
    measured = {sample.image.key: metrics for sample in run.evaluation.samples}
    run = replace(run, evaluation=run.evaluation.model_copy(update={"sample_metrics": measured}))
    html = render_report(store, ReportInputs("t", run, [], [], GATE))
    [card] = html.split('id="gallery">')[1].split("</ul>")[0].split("</li>")[:-1]
    assert "METRIC_OF_MINE_4" in card
    assert len(re.sub(r"data:[^\"]*", "", card)) < pictures.MARKUP

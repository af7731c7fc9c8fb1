"""The report shows as many pictures as fit, by their bytes, and says how many are left out."""

import base64
import io

import pytest
from PIL import Image

from tasks.images import SOURCE_TYPE, encode_png
from tasks.manifests.evaluation import Sample, SubjectMetrics
from tasks.manifests.run import RunManifests
from tasks.publishing.report import pictures
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.publishing.report.pictures import choose, make_gallery
from tasks.publishing.report.tables import SamplePair, list_samples
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.report import GATE, make_run


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


def count(html: str, needle: str) -> int:
    return html.count(needle)


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

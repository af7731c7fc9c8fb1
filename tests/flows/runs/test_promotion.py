"""The champion of a registered model changes only for a model that is shown to be better."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.runs import promotion
from flows.runs.promotion import CHAMPION, Contender, promote
from tasks.errors import ArtifactCorrupt
from tasks.manifests.evaluation import Evaluation, Protocol, Sample, SubjectMetrics
from tasks.manifests.subject import SubjectSet
from tasks.services.config import TrackingConfig
from tasks.services.store.local import LocalStore
from tasks.services.tracking.mlflow_tracker import MlflowTracker
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.report import make_evaluation
from tests.support.subject import make_subject_set

MODEL = "likeness-fish"
PROTOCOL = Protocol(encoders="e", sampling={"guidance_scale": "7.5"})


@pytest.fixture
def tracker(tmp_path: Path) -> MlflowTracker:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    return MlflowTracker(make_config(TrackingConfig), folder=tmp_path)


def store_evaluation(store: LocalStore, key: str, *, dino: float, clip_t: float, protocol: Protocol = PROTOCOL) -> None:
    """Store an evaluation of eight prompts, all of about the same values."""
    whole = make_evaluation(store)
    folder = StageFolder(store, "evaluation", key)
    samples, metrics = [], {}
    for number in range(8):
        image = folder.put(f"tuned-{number}.png", f"{key} {number}".encode())
        samples.append(
            Sample(
                image=image, side="tuned", kind="subject", prompt=f"p{number}", class_prompt="c", seed=1,
                template=f"t{number}", prompt_kind="scene",
            )
        )  # fmt: skip
        # In proportion, so that differences vary too: those that do not have no interval.
        vary = 1 + number / 100
        metrics[image.key] = SubjectMetrics(dino=dino * vary, clip_i=0.5, clip_t=clip_t * vary)
    values = whole.model_dump(exclude={"stage_key", "objects", "samples", "sample_metrics", "seconds"})
    head = folder.head(1, counts={})
    own = {"samples": tuple(samples), "sample_metrics": metrics, "protocol": protocol}
    folder.finish(Evaluation(**{**values, **head, **own}))


def store_subject(store: LocalStore, key: str, *, first: int = 0) -> None:
    folder = StageFolder(store, "subject", key)
    images = make_subject_set(num=3 + first).images[first:]
    values = make_subject_set().model_dump(exclude={"stage_key", "objects", "images", "seconds"})
    folder.finish(SubjectSet(**{**values, **folder.head(1, counts={}), "images": images}))


def register(
    tracker: MlflowTracker, store: LocalStore, key: str, *, dino: float, clip_t: float = 0.5,
    protocol: Protocol = PROTOCOL,
) -> Contender:  # fmt: skip
    store_evaluation(store, key, dino=dino, clip_t=clip_t, protocol=protocol)
    keys = {"evaluation": key, "subject": "s"}
    tracker.start(name=key, params={}, tags={})
    tracker.log_folder(Path(tracker.folder) / "model", path="model")
    tags = {f"likeness.{stage}": own for stage, own in keys.items()}
    version = tracker.register(name=MODEL, path="model", description="", tags=tags)
    tracker.finish(is_failed=False)
    assert version is not None
    return Contender(MODEL, version, keys)


def champion(tracker: MlflowTracker) -> str | None:
    found = tracker.find_alias(MODEL, CHAMPION)
    return None if found is None else found.version


def test_only_a_better_model_of_the_same_subject_takes_the_alias(tracker: MlflowTracker, store: LocalStore) -> None:
    store_subject(store, "s")
    assert champion(tracker) is None  # not even the model is there
    first = register(tracker, store, "a", dino=0.5)
    blocked = promote(tracker, store, replace(first, blockers=("the judge is not reliable",)))
    assert (blocked.is_champion, blocked.blockers) == (False, ("the judge is not reliable",))
    assert champion(tracker) is None
    assert promote(tracker, store, first).is_champion
    assert champion(tracker) == first.version

    equal = promote(tracker, store, register(tracker, store, "b", dino=0.5))
    assert not equal.is_champion
    assert "no significant improvement over the champion (version 1): DINO +0.000" in equal.blockers[0]
    trade = promote(tracker, store, register(tracker, store, "c", dino=0.8, clip_t=0.3))
    assert not trade.is_champion  # more like the subject, but it follows prompts less
    better = register(tracker, store, "d", dino=0.8)
    assert promote(tracker, store, better).is_champion
    assert champion(tracker) == better.version
    assert promote(tracker, store, better).is_champion  # again: it stays

    store_subject(store, "other", first=5)
    other = register(tracker, store, "e", dino=0.9)
    refused = promote(tracker, store, replace(other, keys={"evaluation": "e", "subject": "other"}))
    assert refused.blockers == (
        f"version {better.version}, the champion, was tuned on other photos; promote with --force, or set "
        "tracking.registered_model for this subject",
    )
    assert champion(tracker) == better.version
    tracker.remove_alias(MODEL, CHAMPION)
    assert champion(tracker) is None


def test_a_champion_whose_samples_are_gone_is_not_replaced_silently(tracker: MlflowTracker, store: LocalStore) -> None:
    store_subject(store, "s")
    first = register(tracker, store, "a", dino=0.5)
    promote(tracker, store, first)
    store.delete("04-evaluation/a/manifest.json")
    found = promote(tracker, store, register(tracker, store, "b", dino=0.9))
    assert not found.is_champion
    told = "version 1, the champion, has no samples in the store to compare with; promote with --force"
    assert found.blockers == (told,)


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        (Protocol(encoders="f", sampling=PROTOCOL.sampling), "settings (evaluation.encoders); promote with --force"),
        (Protocol(encoders="e", sampling={"guidance_scale": "1.0"}), "(guidance_scale 1.0, not 7.5)"),
        (Protocol(), "was evaluated by an earlier version of likeness; run it again, or promote with --force"),
    ],
)
def test_a_model_measured_with_another_protocol_is_not_compared_with_the_champion(
    tracker: MlflowTracker, store: LocalStore, protocol: Protocol, told: str
) -> None:
    store_subject(store, "s")
    promote(tracker, store, register(tracker, store, "a", dino=0.5))
    found = promote(tracker, store, register(tracker, store, "b", dino=0.9, protocol=protocol))
    assert not found.is_champion
    assert told in found.blockers[0]
    assert "--unpaired" not in found.blockers[0]


def test_a_champion_promoted_during_the_comparison_is_compared_with_too(
    tracker: MlflowTracker, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_subject(store, "s")
    promote(tracker, store, register(tracker, store, "a", dino=0.3))
    best = register(tracker, store, "b", dino=0.9)
    middle = register(tracker, store, "c", dino=0.5)
    compare = promotion.find_weaknesses

    def compare_slowly(*arguments: Any) -> list[str]:
        found = compare(*arguments)
        tracker.set_alias(MODEL, CHAMPION, best.version)  # another run, meanwhile
        return found

    monkeypatch.setattr(promotion, "find_weaknesses", compare_slowly)
    found = promote(tracker, store, middle)
    assert "no significant improvement over the champion (version 2)" in found.blockers[0]
    assert champion(tracker) == best.version


@pytest.mark.parametrize("error", [OSError(40, "Too many levels of symbolic links"), ArtifactCorrupt("damaged")])
def test_an_unreadable_store_keeps_the_alias_and_does_not_fail_the_run(
    tracker: MlflowTracker, store: LocalStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> list[str]:
        raise error

    store_subject(store, "s")
    promote(tracker, store, register(tracker, store, "a", dino=0.3))
    monkeypatch.setattr(promotion, "find_weaknesses", fail)
    found = promote(tracker, store, register(tracker, store, "b", dino=0.9))
    assert found.blockers == (f"the promotion failed: {error}",)
    assert champion(tracker) == "1"

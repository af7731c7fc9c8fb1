"""Means, intervals, findings and preferences of a scoreboard, on evaluations whose differences are known."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from conf.request import RunRequest
from flows.cli.scoreboard.tables import list_notes
from flows.scoreboard.cells import Cell, Result
from flows.scoreboard.picture import write_picture
from flows.scoreboard.plan import BASE, Plan
from flows.scoreboard.standings import Key, Loaded, Row, Standings, average_subjects, prefer, rank
from tasks.evaluation.comparison import Candidate
from tasks.images import decode_png, encode_png
from tasks.manifests.evaluation import CeilingMetrics, DriftMetrics, Estimate, Evaluation, Sample, SubjectMetrics
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.tiny import draw_photo

PROMPTS, SAMPLES = 8, 2
DIRECTION = {"claim": "c", "method": "full", "reference": "free", "metrics": ["div", "pres"], "expected": "lower"}
SUBJECTS = ("mug", "robot", "house", "fish")


def make_model(store: LocalStore, key: Key, *, dino: float, clip_t: float, pres: float) -> Loaded:
    """Return an evaluation with these means, and noise of subject, prompt and seed that all models share."""
    method, subject, seed = key
    shared = np.random.default_rng(sum(map(ord, subject))).normal(0, 0.05, (2, PROMPTS, SAMPLES))
    own = np.random.default_rng([sum(map(ord, method + subject)), seed]).normal(0, 0.002, (2, PROMPTS, SAMPLES))
    folder = StageFolder(store, "evaluation", "-".join(map(str, key)))
    samples, values, classes = [], {}, {}
    photo = folder.put("photo.png", encode_png(draw_photo(0, size=16)))
    for side, shift in (("base", 0.0), ("tuned", 1.0)):
        for prompt, number in np.ndindex(PROMPTS, SAMPLES):
            ref = folder.put(f"{side}-{prompt}-{number}.png", encode_png(draw_photo(prompt, size=16)))
            row = {"image": ref, "side": side, "kind": "subject", "prompt": "", "class_prompt": "", "seed": number,
                   "template": f"{{subject}} {prompt}"}  # fmt: skip
            samples.append(Sample.model_validate(row))
            noise = shared[:, prompt, number] + shift * own[:, prompt, number]
            values[ref.key] = SubjectMetrics(
                dino=0.5 + noise[0] + shift * dino, clip_i=0.5, clip_t=0.3 + noise[1] + shift * clip_t
            )
        ref = folder.put(f"{side}-class.png", encode_png(draw_photo(9, size=16)))
        samples.append(Sample.model_validate({**row, "image": ref, "kind": "class", "template": ""}))
        classes[ref.key] = {"pres": 0.4 + shift * (pres + own[0, 0, 0])}
    evaluation = folder.finish(
        Evaluation(
            **folder.head(5, counts={}), samples=tuple(samples), sample_metrics=values, class_metrics=classes,
            metrics={"tuned": SubjectMetrics(dino=0, clip_i=0, clip_t=0)},
            drift={"tuned": DriftMetrics(pres=0, dino_div=0)}, published_step=1,
            ceiling=CeilingMetrics(dino=0.9, clip_i=1, clip_t=0.7 if method == "full" else 0.2),
        )
    )  # fmt: skip
    return Loaded(store, Candidate("-".join(map(str, key)), evaluation, frozenset({subject}), {}), photo)


def make_models(
    store: LocalStore, subjects: Iterable[str] = SUBJECTS, seeds: Iterable[int] = (1,)
) -> dict[Key, Loaded]:
    effects = {
        "full": {"dino": 0.3, "clip_t": 0.0, "pres": 0.1},
        "free": {"dino": 0.35, "clip_t": -0.05, "pres": 0.4},
        "token": {"dino": 0.1, "clip_t": 0.0, "pres": 0.0},
    }
    return {
        (method, subject, seed): make_model(store, (method, subject, seed), **effect)
        for method, effect in effects.items()
        for subject in subjects
        for seed in seeds
    }


def make_plan(**changes: object) -> Plan:
    plain = {"seeds": [1], "reference": "full", "methods": {"full": {}, "free": {}, "token": {}}}
    return Plan.model_validate({**plain, "directions": [DIRECTION], **changes})


def test_means_and_differences_are_over_subjects_with_intervals_that_hold_the_truth(tmp_path: Path) -> None:
    found = rank(make_models(LocalStore(tmp_path)), make_plan())
    rows = {row.method: row for row in found.rows}
    assert list(rows) == [BASE, "full", "free", "token"]
    assert rows["full"].num_models == 4
    assert rows["full"].means["dino"].num == 4
    assert rows["full"].differences == {}
    for method, truth in (("free", 0.05), ("token", -0.2), (BASE, -0.3)):
        difference = rows[method].differences["dino"]
        assert difference.low is not None and difference.high is not None
        assert difference.low < truth < difference.high
        assert difference.is_decided, "what the subjects share cancels in a paired difference"
    mean = rows["full"].means["dino"]
    assert mean.low is not None and mean.low < 0.8 < (mean.high or 0)
    assert found.ceiling["dino"].mean == pytest.approx(0.9)
    assert found.ceiling["clip_t"].mean == pytest.approx(0.7), "with the class noun of the reference"


def test_a_finding_is_judged_by_the_first_metric_that_was_measured(tmp_path: Path) -> None:
    models = make_models(LocalStore(tmp_path))
    [holds] = rank(models, make_plan()).findings
    assert (holds.metric, holds.verdict) == ("pres", "holds")
    assert holds.difference is not None
    assert holds.difference.mean == pytest.approx(-0.3, abs=0.01)
    for method, metric, word, verdict in (
        ("token", "dino", "lower", "holds"),
        ("token", "dino", "higher", "opposite"),
        ("token", "clip_t", "lower", "undecided"),
        ("token", "div", "lower", "not measured"),
    ):
        plain = {"claim": "c", "method": method, "reference": "full", "metrics": [metric], "expected": word}
        [found] = rank(models, make_plan(directions=[plain])).findings
        assert found.verdict == verdict, plain


def test_a_method_is_preferred_where_none_beats_it(tmp_path: Path) -> None:
    found = rank(make_models(LocalStore(tmp_path)), make_plan())
    for each in found.preferences:
        assert each.preferred == ("full", "free"), "free trades CLIP-T for DINO, so neither beats the other"
        assert each.beaten["token"] == ("full",)
        assert set(each.beaten[BASE]) == {"full", "token"}
        assert each.gains["full"]["dino"].is_decided


def test_one_subject_has_intervals_over_its_prompts(tmp_path: Path) -> None:
    found = rank(make_models(LocalStore(tmp_path), ["mug"]), make_plan())
    assert {row.means["dino"].num for row in found.rows} == {PROMPTS}
    assert all(row.means["dino"].low is not None for row in found.rows)


def test_training_seeds_pair_by_position_whatever_they_are_called(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    models = make_models(store, seeds=(1, 2))
    other = {
        ("peer", subject, 0): make_model(store, ("peer", subject, 0), dino=0.3, clip_t=0.0, pres=0.1)
        for subject in SUBJECTS
    }
    rows = {row.method: row for row in rank({**models, **other}, make_plan()).rows}
    assert rows["full"].num_models == 8
    assert rows["peer"].num_models == 4
    assert rows["peer"].differences["dino"].mean == pytest.approx(0, abs=0.01)
    assert rows[BASE].differences["dino"].mean == pytest.approx(-0.3, abs=0.01)


def test_trainings_of_one_subject_that_differ_decide_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    models = make_models(store, ["mug"], seeds=(1, 2))
    assert rank(models, make_plan()).preferences[0].beaten["token"] == ("full",)
    for seed, dino in ((1, 0.1), (2, 0.5)):  # the mean stays, 0.2 above the method with a token
        models["full", "mug", seed] = make_model(store, ("full", "mug", seed), dino=dino, clip_t=0.0, pres=0.1)
    found = rank(models, make_plan())
    rows = {row.method: row for row in found.rows}
    assert rows["full"].means["dino"].low is not None
    assert rows["full"].means["dino"].low < 0.6
    assert not rows["token"].differences["dino"].is_decided
    assert found.preferences[0].beaten["token"] == ()
    [finding] = rank(
        models, make_plan(directions=[{**DIRECTION, "method": "token", "reference": "full", "metrics": ["dino"]}])
    ).findings
    assert finding.verdict == "undecided"


def test_two_subjects_weigh_their_trainings_as_their_prompts(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    models = make_models(store, ["mug", "robot"], seeds=(1, 2))
    for seed, dino in ((1, 0.1), (2, 0.5)):
        models["full", "mug", seed] = make_model(store, ("full", "mug", seed), dino=dino, clip_t=0.0, pres=0.1)
    rows = {row.method: row for row in rank(models, make_plan()).rows}
    mean = rows["full"].means["dino"]
    # Half of the prompts: 12.7 times the standard error 0.2, halved.
    assert mean.low is not None and mean.high is not None
    assert mean.mean - mean.low == pytest.approx(1.27, abs=0.05)
    assert mean.high == 1.0  # no cosine is larger


def test_the_mean_over_subjects_of_what_photos_reach_has_an_interval() -> None:
    def photos(*means: float, half: float | None = 0.1) -> list[Estimate]:
        ends = [(None, None) if half is None else (mean - half, mean + half) for mean in means]
        return [Estimate(mean=mean, low=low, high=high, num=5) for mean, (low, high) in zip(means, ends, strict=True)]

    three = average_subjects(photos(0.7, 0.8, 0.9, half=None))
    assert (three.low, three.high) == pytest.approx((0.8 - 4.3027 * 0.1 / 3**0.5, 0.8 + 4.3027 * 0.1 / 3**0.5), 1e-4)
    two = average_subjects(photos(0.7, 0.9))
    assert (two.low, two.mean, two.high) == pytest.approx((0.8 - 0.1 / 2**0.5, 0.8, 0.8 + 0.1 / 2**0.5))
    assert average_subjects(photos(0.7, 0.9, half=None)).low is None


def test_the_notes_say_whether_training_seeds_are_in_the_intervals() -> None:
    def read_notes(subjects: tuple[str, ...], seeds: tuple[int, ...], num: int) -> str:
        standings = Standings((), {}, (Row("full", num, {"dino": Estimate(mean=0.5, num=num)}),), (), ())
        cells = [Cell("full", subject, seed, RunRequest()) for subject in subjects for seed in seeds]
        return list_notes(standings, [Result(cell, folder=Path()) for cell in cells])[0]

    alone, absent = "For one subject alone: ", "training-seed variance is not in the intervals"
    one = read_notes(SUBJECTS, (1,), 4)
    assert f"{alone}One training seed per model compares models, not settings: {absent}" in one
    assert f"{alone}Intervals contain the variance between training seeds" in read_notes(SUBJECTS, (1, 2), 4)
    few = read_notes(("mug",), (1,), PROMPTS)
    assert absent in few
    assert alone not in few


def test_the_picture_has_a_column_per_method_and_a_row_per_subject(tmp_path: Path) -> None:
    models = make_models(LocalStore(tmp_path / "store"))
    del models["token", "mug", 1]
    path = write_picture(models, tmp_path / "s.png", reference="full")
    picture = decode_png(path.read_bytes())
    assert picture.width / picture.height == pytest.approx(6 / 4, rel=0.05)
    cell = picture.crop((5 * 164, 24, 5 * 164 + 160, 24 + 160))
    assert cell.getextrema() == ((255, 255),) * 3, "a missing model stays white"


def test_methods_without_a_shared_metric_are_not_compared() -> None:
    from tasks.intervals import pool_trainings

    measured = pool_trainings([{str(prompt): {0: 0.5 + prompt / 100} for prompt in range(6)}])
    found = prefer(
        "mug", {"full": {"mug": {"dino": measured, "clip_t": measured}}, "lora": {"mug": {"pres": measured}}}
    )
    assert set(found.preferred) == {"full", "lora"}

"""The safety checker: what it refuses is neither kept nor measured, and counted by side."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.encoders.safety import find_safety_checker
from tasks.errors import ConfigError
from tasks.evaluation.config import EvaluationConfig
from tasks.evaluation.steps import EvaluationInputs, drop_unsafe
from tasks.images import decode_png, encode_png
from tasks.manifests.evaluation import Sample
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder, find_manifest, read_verified
from tests.support.config import make_config
from tests.support.report import GATE, make_run
from tests.support.tiny import draw_photo, tiny_diffusion_config
from tests.support.tiny_safety import add_safety_checker, open_checker, refuse


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A tiny Stable Diffusion with a safety checker that refuses nothing yet."""
    return add_safety_checker(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def store_samples(folder: StageFolder) -> tuple[Sample, ...]:
    samples = []
    for side in ("base", "tuned"):
        for kind, num in (("subject", 2), ("class", 3)):
            for number in range(num):
                seed = len(samples)
                ref = folder.put_resumable(f"{side}/{kind}-{number}.png", encode_png(draw_photo(seed % 5, seed=seed)))
                values = {"image": ref, "side": side, "kind": kind, "prompt": "p", "class_prompt": "c", "seed": number}
                samples.append(Sample.model_validate(values))
    return tuple(samples)


def make_inputs(model: Path, **changes: Any) -> EvaluationInputs:
    run = make_run(LocalStore(model.parent / "other"))
    config = make_config(EvaluationConfig, **changes)
    return EvaluationInputs(config, tiny_diffusion_config(model), run.training, run.subject)


def test_refused_samples_are_dropped_and_counted_unless_the_checker_is_off(model: Path, store: LocalStore) -> None:
    folder = StageFolder(store, "evaluation", "k")
    samples = store_samples(folder)
    assert drop_unsafe(folder, make_inputs(model), samples) == (samples, {"base": 0, "tuned": 0})
    unsafe = samples[6]
    refuse(model, like=decode_png(read_verified(store, unsafe.image)))
    assert drop_unsafe(folder, make_inputs(model, safety_checker="none"), samples) == (samples, {})
    kept, dropped = drop_unsafe(folder, make_inputs(model), samples)
    assert dropped == {"base": 0, "tuned": 1}
    assert kept == tuple(sample for sample in samples if sample != unsafe)
    # Neither the picture nor the note that would let a resumed evaluation take it.
    assert store.find_bytes(unsafe.image.key) is None
    assert folder.reuse("tuned/subject-1.png") is None
    run = make_run(LocalStore(model.parent / "other"))
    evaluation = run.evaluation.model_copy(
        update={"samples": kept, "dropped": dropped, "stage_key": "k", "objects": ()}
    )
    folder.finish(evaluation)
    found = find_manifest(store, type(evaluation), stage="evaluation", key="k")
    assert found is not None
    assert found.dropped == {"base": 0, "tuned": 1}
    assert unsafe.image.key not in {ref.key for ref in found.objects}


def test_too_few_samples_left_is_one_line_with_the_way_out(model: Path, store: LocalStore) -> None:
    refuse(model)
    folder = StageFolder(store, "evaluation", "k")
    with pytest.raises(ConfigError, match=r"refused 5 samples of the base model: 0 subject samples are left") as caught:
        drop_unsafe(folder, make_inputs(model), store_samples(folder))
    assert "evaluation.safety_checker=none" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_report_says_how_many_samples_were_refused(store: LocalStore) -> None:
    run = make_run(store)
    inputs = ReportInputs("T", run, (), (), GATE)
    assert "safety checker" not in render_report(store, inputs)
    evaluation = run.evaluation.model_copy(update={"dropped": {"base": 1, "tuned": 3}})
    object.__setattr__(run, "evaluation", evaluation)
    assert "refused 1 sample of the base and 3 of the tuned model" in render_report(store, inputs)


def test_a_model_without_a_checker_has_none(tiny_model_folder: Path) -> None:
    assert find_safety_checker("auto", tiny_diffusion_config(tiny_model_folder)) is None
    assert find_safety_checker("auto", tiny_diffusion_config(Path("mini"))) is None
    config = tiny_diffusion_config(tiny_model_folder).model_copy(update={"family": "flux"})
    assert find_safety_checker("auto", config) is None


def test_a_checker_that_cannot_be_had_is_one_line_with_the_way_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (model / "safety_checker" / "model.safetensors").rename(model / "safety_checker" / "pytorch_model.bin")
    index = json.loads((model / "model_index.json").read_text())
    for change, location, reason in (
        ({}, str(model), "lacks safety_checker/model.safetensors"),
        (
            {"safety_checker": ["evil", "Checker"]},
            str(model),
            "has the safety checker 'Checker', which isn't",
        ),
        ({"safety_checker": 3}, str(model), "model_index.json can't be read"),
        ({}, "nobody/nothing", "no safety checker of nobody/nothing: it is not cached and the hub is not reached"),
    ):
        (model / "model_index.json").write_text(json.dumps({**index, **change}))
        config = tiny_diffusion_config(Path(location))
        with pytest.raises(ConfigError, match=reason) as caught:
            find_safety_checker("auto", config)
        assert "\n" not in str(caught.value)


def test_weights_that_the_checker_lacks_are_refused_instead_of_random(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = model / "safety_checker" / "model.safetensors"
    tensors = load_file(path)
    del tensors["visual_projection.weight"]
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"lacks 1 weights of a StableDiffusionSafetyChecker"):
        open_checker(model)

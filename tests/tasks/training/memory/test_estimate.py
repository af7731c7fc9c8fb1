"""Predicted memory: parameters exactly, activations as a real forward keeps them, ordered as methods are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.schema import RunConfig
from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.hub import find_config_folder
from tasks.diffusion.registry import load_model
from tasks.training.data.batches import BatchFactory, StepBatch
from tasks.training.data.datamodule import DreamBoothDataModule
from tasks.training.memory.estimate import build_meta_model, estimate_memory, estimate_methods
from tasks.training.memory.table import MemoryEstimate, look_up
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import TrainingSpec
from tests.support.tiny import family_spec
from tests.support.tiny_families import MAKERS


def estimate(spec: TrainingSpec) -> MemoryEstimate:
    return estimate_memory(Path(spec.model_folder), spec.diffusion, spec.training)


def measure_kept(module: DreamBoothModule, batches: BatchFactory) -> int:
    """Return the bytes that a real forward keeps for the backward."""
    weights = {
        p.untyped_storage().data_ptr()
        for part in module.model.components.values()
        if isinstance(part, torch.nn.Module)
        for p in part.parameters()
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    indices = list(range(module.spec.training.train_batch_size))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module.training_step(StepBatch(indices, batches.make(indices, module.model.device)), 0)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("method", ["full", "lora", "textual_inversion"])
@pytest.mark.parametrize("family", MAKERS)
def test_the_estimate_agrees_with_a_real_forward(tmp_path: Path, family: str, method: str) -> None:
    folder = MAKERS[family](tmp_path / "base" / "model")
    spec = family_spec(tmp_path, folder, family=family, method=method, train_batch_size=2)
    model = load_model(spec.diffusion)
    assert isinstance(model, DiffusionModel)
    module = DreamBoothModule(model, spec)
    batches = DreamBoothDataModule(model, spec).make_batches()
    module.configure_model()
    predicted = estimate(spec)
    assert predicted.trainable_parameters == sum(p.numel() for _, p in module.named_trained())
    assert predicted.activations == pytest.approx(measure_kept(module, batches), rel=0.25)


def test_memory_saving_options_lower_the_estimate(tmp_path: Path, tiny_model_folder: Path) -> None:
    def total(**changes: object) -> MemoryEstimate:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return estimate(family_spec(folder, tiny_model_folder, family="stable_diffusion", **changes))

    full, lora = total(), total(method="lora")
    assert lora.total < full.total
    assert lora.optimizer_state < full.optimizer_state / 2
    assert total(gradient_checkpointing=True).activations < full.activations
    assert total(train_batch_size=2).activations > 1.5 * full.activations
    assert total(ema_decay=0.99).ema == full.trainable_parameters * 4
    assert total(optimizer="adamw8bit").optimizer_state == full.optimizer_state / 4


PRESETS = ("mini", "sd15", "sd21", "sdxl", "sd35-medium", "flux-dev")
METHODS = ("full", "lora", "textual_inversion", "textual_inversion+lora", "textual_inversion+full")
# As the published checkpoints have them.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sd21": {"unet": 865_910_724, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840},
    "sd35-medium": {"transformer": 2_243_171_520, "text_encoder_3": 4_762_310_656, "vae": 83_819_683},
    "flux-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
}


def preset_config(name: str, *words: str) -> RunConfig:
    llm = [] if name == "mini" else ["llm=openai"]
    subject = ["subject.source=x", "subject.class_noun=thing"]
    return compile_request(parse_overrides([f"diffusion={name}", *subject, *llm, *words]))


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_architectures_have_the_published_parameter_counts(name: str) -> None:
    config = preset_config(name).diffusion
    parts = build_meta_model(find_config_folder(config), config).components
    assert {part: sum(p.numel() for p in parts[part].parameters()) for part in PARAMETERS[name]} == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_looked_up_in_the_table_and_other_settings_are_not(name: str) -> None:
    config = preset_config(name)
    found = look_up(config.diffusion, config.training, METHODS)
    assert found is not None
    assert list(found) == list(METHODS)
    assert found["lora"].total < found["full"].total
    for words in (("training.lora.rank=5",), ("diffusion.resolution=256",)):
        other = preset_config(name, *words)
        assert look_up(other.diffusion, other.training, METHODS) is None


@pytest.mark.parametrize(
    ("name", "methods", "words"),
    [
        ("mini", METHODS, ()),
        ("sd15", ("full", "lora"), ("training.train_batch_size=3", "prior=none", "training.optimizer=adamw8bit")),
        ("flux-dev", ("lora",), ("training.ema_decay=0.9",)),
    ],
)
def test_the_table_matches_the_computed_estimate(name: str, methods: tuple[str, ...], words: tuple[str, ...]) -> None:
    config = preset_config(name, *words)
    found = estimate_methods(find_config_folder(config.diffusion), config.diffusion, config.training, methods=methods)
    known = look_up(config.diffusion, config.training, methods)
    assert known is not None
    for method in methods:
        # Some activations, as those of rotary embeddings, don't grow with the batch.
        assert known[method].activations == pytest.approx(found[method].activations, rel=0.01)
        assert replace(known[method], activations=0) == replace(found[method], activations=0)


def test_estimating_methods_together_equals_estimating_them_separately(tiny_model_folder: Path, tmp_path: Path) -> None:
    spec = family_spec(tmp_path, tiny_model_folder, family="stable_diffusion")
    together = estimate_methods(tiny_model_folder, spec.diffusion, spec.training, methods=METHODS)
    for method in METHODS:
        training = spec.training.model_copy(update={"method": method})
        assert together[method] == estimate_memory(tiny_model_folder, spec.diffusion, training)


def test_the_smallest_gpu_that_fits_is_found() -> None:
    def card(gib: float) -> int | None:
        return MemoryEstimate(int(gib * 2**30), 0, 0, 0, 0, 0, 0).find_smallest_gpu()

    assert [card(gib) for gib in (1, 7, 12, 20, 60, 90)] == [8, 8, 16, 24, 80, None]

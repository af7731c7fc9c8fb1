"""Options of training that change what is learned or how a process is set up: without its option a test here fails."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import LORA_FILE
from tasks.training.config import TrainingConfig
from tasks.training.module import DreamBoothModule
from tasks.training.optimizers import check_compiler, set_up_kernels
from tasks.training.process.supervisor import run_worker
from tasks.training.process.worker import count_cores, set_up_process
from tasks.training.process.worker_spec import RunFolder, compute_learning_rate_factor
from tests.support.config import make_config
from tests.support.tiny import describe_image, make_spec, train_here

Weights = dict[str, torch.Tensor]
Train = Callable[..., Weights]
BASES: dict[str, dict[str, Any]] = {
    "full": {"max_train_steps": 2},
    "lora": {"max_train_steps": 2, "method": "lora", "lora": {"learning_rate": 1e-2, "save_precision": "fp32"}},
    "token": {"max_train_steps": 2, "method": "textual_inversion", "textual_inversion": {"learning_rate": 0.1}},
}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("full", {"learning_rate": 1e-4}),
    ("full", {"text_encoder_learning_rate": 1e-4}),
    ("full", {"train_text_encoder": False}),
    ("full", {"train_denoiser": False}),
    ("full", {"weight_decay": 0.9}),
    ("full", {"optimizer": "prodigy"}),
    ("full", {"max_grad_norm": 1e-6}),
    ("full", {"prior_loss_weight": 0.25}),
    ("full", {"snr_gamma": 0.5}),
    ("full", {"train_batch_size": 1}),
    ("full", {"gradient_accumulation_steps": 2}),
    ("full", {"max_train_steps": 3}),
    ("full", {"flip_probability": 1.0}),
    ("full", {"mixed_precision": "bf16"}),
    ("lora", {"lora": {"learning_rate": 1e-3}}),
    ("lora", {"lora": {"text_encoder_learning_rate": 1e-3}}),
    ("lora", {"lora": {"rank": 2}}),
    ("lora", {"lora": {"lora_alpha": 4.0}}),
    ("lora", {"lora": {"lora_dropout": 0.5}}),
    ("lora", {"lora": {"target_modules": ("to_q",)}}),
    ("token", {"textual_inversion": {"learning_rate": 0.01}}),
    ("token", {"textual_inversion": {"num_vectors": 3}}),
    ("token", {"textual_inversion": {"initializer_token": "snow"}}),
]


def name_change(value: Any) -> str | None:
    """Return a parameter's id: the option's dotted name."""
    if not isinstance(value, dict):
        return None
    [(name, inner)] = value.items()
    return f"{name}.{next(iter(inner))}" if isinstance(inner, dict) else str(name)


def read_weights(run: RunFolder) -> Weights:
    """Return all tensors of a tuned model by file and name."""
    return {
        f"{path.relative_to(run.model)}:{name}": tensor
        for path in sorted(run.model.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings with changes put in, nested ones too."""
    nested = {name: {**base.get(name, {}), **value} for name, value in changes.items() if isinstance(value, dict)}
    return {**base, **changes, **nested}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Train:
    """Train a tiny model; equal settings are trained once."""
    done: dict[str, Weights] = {}

    def train_once(settings: dict[str, Any]) -> Weights:
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            done[key] = read_weights(train_here(tmp_path_factory.mktemp("run"), tiny_model_folder, **settings))
        return done[key]

    return train_once


def is_equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(
        tensor.shape == second[name].shape and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


@pytest.mark.parametrize(("base", "changes"), CHANGES, ids=name_change)
def test_an_option_changes_the_trained_weights(train: Train, base: str, changes: dict[str, Any]) -> None:
    assert not is_equal(train(BASES[base]), train(merge(BASES[base], changes)))


def test_the_seed_changes_the_trained_weights(tmp_path: Path, tiny_model_folder: Path) -> None:
    specs = [make_spec(tmp_path / str(seed), tiny_model_folder, max_train_steps=2) for seed in (5, 6)]
    first, other = (
        train_here(tmp_path, tiny_model_folder, spec=spec.model_copy(update={"seed": seed}))
        for spec, seed in zip(specs, (5, 6), strict=True)
    )
    assert not is_equal(read_weights(first), read_weights(other))


def test_background_loss_weight_changes_the_trained_weights_of_masked_photos(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (32, 32, 96, 96))
    mask.save(tmp_path / "mask.png")
    runs = []
    for weight in (1.0, 0.0):
        folder = tmp_path / f"weight-{weight}"
        spec = make_spec(folder, tiny_model_folder, max_train_steps=2, background_loss_weight=weight)
        photos = [Path(image.path) for image in spec.instance_images]
        masked = tuple(describe_image(path, "a photo of sks fish", mask=tmp_path / "mask.png") for path in photos)
        spec = spec.model_copy(update={"instance_images": masked})
        runs.append(read_weights(train_here(folder, tiny_model_folder, spec=spec)))
    assert not is_equal(*runs)


def events_of(run: RunFolder, kind: str) -> list[int]:
    rows = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [row["step"] for row in rows if row["event"] == kind]


def test_checkpointing_steps_and_checkpoints_total_limit_are_respected(tmp_path: Path, tiny_model_folder: Path) -> None:
    run = train_here(tmp_path, tiny_model_folder, max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=3)
    assert events_of(run, "checkpoint") == [2, 4, 6, 8]
    assert len(list(run.checkpoints.glob("step-*"))) == 3


def test_log_every_n_steps_sets_the_logging_interval(tmp_path: Path, tiny_model_folder: Path) -> None:
    run = train_here(tmp_path, tiny_model_folder, max_train_steps=6, checkpointing_steps=6, log_every_n_steps=3)
    assert events_of(run, "step") == [3, 6]


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_num_threads_and_deterministic_are_applied_to_the_process(
    tmp_path: Path, tiny_model_folder: Path, is_deterministic: bool
) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    spec = make_spec(tmp_path, tiny_model_folder, num_threads=3, deterministic=is_deterministic)
    try:
        set_up_process(spec)
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled() is is_deterministic
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path) -> DiffusionModel:
    opened = load_model(make_spec(tmp_path / "model", tiny_model_folder).diffusion)
    assert isinstance(opened, DiffusionModel)
    return opened


def test_allow_tf32_sets_the_flags_of_matmul_and_cudnn(model: DiffusionModel) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for is_allowed in (True, False):
            set_up_kernels(model, make_config(TrainingConfig, allow_tf32=is_allowed))
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (is_allowed, is_allowed)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_channels_last_sets_the_memory_format_of_convolutions(model: DiffusionModel) -> None:
    weight = model.denoiser.conv_in.weight
    set_up_kernels(model, make_config(TrainingConfig, channels_last=True))
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_option_compiles_the_denoiser_blocks(model: DiffusionModel) -> None:
    try:
        check_compiler(model.device)
    except Exception as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    set_up_kernels(model, make_config(TrainingConfig, compile=True))
    assert any(module._compiled_call_impl is not None for module in model.denoiser.modules())


@pytest.mark.parametrize("is_on", [True, False])
def test_gradient_checkpointing_is_set_on_denoiser_and_text_encoders(
    tmp_path: Path, tiny_model_folder: Path, is_on: bool
) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, gradient_checkpointing=is_on)
    opened = load_model(spec.diffusion)
    assert isinstance(opened, DiffusionModel)
    DreamBoothModule(opened, spec).configure_model()
    for part in (opened.denoiser, *opened.text_encoders.values()):
        # The flag of the layers: transformers renames that of the whole model in v6.
        flags = {m.gradient_checkpointing for m in part.modules() if hasattr(m, "gradient_checkpointing")}
        assert flags == {is_on}


def read_grids(run: RunFolder) -> dict[str, tuple[tuple[int, int], bytes]]:
    """Return the size and pixels of every grid of samples."""
    grids = {}
    for path in sorted(run.samples.glob("*.png")):
        with Image.open(path) as opened:
            grids[path.stem] = opened.size, opened.convert("RGB").tobytes()
    return grids


def test_sample_steps_prompts_and_inference_steps_are_respected(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = {"sample_steps": 2, "sample_prompts": ("a photo of {subject}",), "sample_num_inference_steps": 2}
    changes = [{}, {"sample_prompts": ("{subject} in the snow", "a {subject}")}, {"sample_num_inference_steps": 4}]
    first, prompts, steps = (
        read_grids(train_here(tmp_path / str(n), tiny_model_folder, max_train_steps=4, validation={**plain, **change}))
        for n, change in enumerate(changes)
    )
    assert list(first) == ["step-00000002", "step-00000004"]
    for name, ((width, height), pixels) in first.items():
        assert prompts[name][0] == (width, 2 * height)
        assert steps[name][1] != pixels


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"lr_scheduler": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, [0.0, 0.5, 1.0, 1.0]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [1.0, 0.5625, 0.25, 0.0625]),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [1.0, 0.5, 1.0, 0.5]),
    ],
)
def test_lr_scheduler_options_determine_the_learning_rate_factors(
    changes: dict[str, Any], factors: list[float]
) -> None:
    config = make_config(TrainingConfig, max_train_steps=4, **changes)
    found = [compute_learning_rate_factor(config, step, rate=1.0) for step in range(4)]
    assert found == pytest.approx(factors, abs=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_an_adapter_is_saved_in_the_configured_precision(
    tmp_path: Path, tiny_model_folder: Path, name: str, dtype: torch.dtype
) -> None:
    lora = {"learning_rate": 1e-2, "save_precision": name}
    run = train_here(tmp_path, tiny_model_folder, max_train_steps=1, method="lora", lora=lora)
    saved = load_file(run.model / LORA_FILE)
    assert {tensor.dtype for tensor in saved.values()} == {dtype}


def test_a_worker_is_killed_after_grace_seconds_even_before_it_saves(tmp_path: Path, tiny_model_folder: Path) -> None:
    settings = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "grace_seconds": 1e-3}
    spec = make_spec(tmp_path, tiny_model_folder, **settings)
    waking: list[threading.Timer] = []

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            [worker] = [p for p in psutil.Process().children() if "tasks.training.process.worker" in p.cmdline()]
            worker.suspend()  # it could save five seconds from now, had it that long
            waking.append(threading.Timer(5, lambda: worker.resume() if worker.is_running() else None))
            waking[0].start()
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            run_worker(spec, on_event=interrupt)
    finally:
        for timer in waking:
            timer.cancel()
    assert not list(RunFolder(spec.path).checkpoints.glob("step-*"))


@pytest.mark.parametrize(
    ("value", "expected"), [("1", 1), ("3,1", 3), ("", os.cpu_count()), ("many", os.cpu_count()), ("0", os.cpu_count())]
)
def test_without_num_threads_openmps_variable_counts(
    value: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert count_cores() == expected

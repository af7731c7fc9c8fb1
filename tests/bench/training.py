"""Measure training steps and print them as Markdown: speed, memory, where the time goes, and a peer's ratio.

    python -m tests.bench.training [--model mini|sd15] [--steps 30] [--peer PATH/train_dreambooth.py]

Seconds per step are the worker's own, of a run through the real entrance, those up to the first log line left out;
of the peer they are the difference of two runs of different length. `--peer` runs diffusers' own script on the same
weights, images, steps and precision, in turn with ours; the file is yours to supply, and so is torchvision, which it
imports: PEER_PYTHONPATH names a folder that has it. `sd15` is the architecture of
Stable Diffusion 1.5 with random weights, which serve for speed; it wants a GPU. On a GPU the peak is that of torch's
allocator, for both sides; else it is resident memory. `--levers` prints `likeness estimate`'s prediction beside it.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tasks.diffusion.adapter import DTYPES
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.hub import MINI_FOLDER
from tasks.diffusion.registry import load_model
from tasks.mini.world.scenes import CLASS_NOUNS, draw_subject
from tasks.stage.digests import digest_folder
from tasks.training.config import TrainingConfig
from tasks.training.data.datamodule import DreamBoothDataModule
from tasks.training.losses import prior_preservation_loss
from tasks.training.memory.estimate import estimate_memory
from tasks.training.module import DreamBoothModule
from tasks.training.process.supervisor import run_worker
from tasks.training.process.worker_spec import TrainingImage, TrainingSpec
from tests.support.config import make_config
from tests.support.tiny import describe_image

INSTANCE_PROMPT, CLASS_PROMPT = "a photo of sks fish", "a photo of a fish"


@dataclass(frozen=True)
class Case:
    """What is measured: a model, its images, and how a step is set up."""

    model: Path
    resolution: int
    batch_size: int
    precision: str
    folder: Path

    @property
    def halves(self) -> dict[str, Path]:
        """Folders of instance and class images."""
        return {"instance": self.folder / "instance", "class": self.folder / "class"}

    def draw_images(self) -> None:
        """Draw what both sides train on."""
        for kind, seed, num in (("instance", 7, 4), ("class", 11, 12)):
            draw_subject("fish", seed=seed, num=num, folder=self.halves[kind], size=max(128, self.resolution))

    def spec(self, folder: Path, *, steps: int, **changes: Any) -> TrainingSpec:
        """Return the order for our worker."""
        settings = {
            "max_train_steps": steps, "train_batch_size": self.batch_size, "learning_rate": 2e-6,
            "mixed_precision": {"fp32": "no"}.get(self.precision, self.precision),
            "checkpointing_steps": 100_000, "log_every_n_steps": 10, "deterministic": False, **changes,
        }  # fmt: skip

        def images(kind: str, prompt: str) -> tuple[TrainingImage, ...]:
            paths = sorted(self.halves[kind].iterdir())
            return tuple(describe_image(path, prompt) for path in paths)

        return TrainingSpec(
            stage_key="bench", folder=str(folder), latent_folder=str(folder / "latents"), model_folder=str(self.model),
            base_model_sha256=digest_folder(self.model) if self.model.stat().st_size < 1e6 else "bench",
            seed=1, identifier_token="sks", class_noun="fish",
            diffusion=make_config(
                DiffusionConfig, pretrained_model_name_or_path=str(self.model), resolution=self.resolution
            ),
            training=make_config(TrainingConfig, **settings),
            instance_images=images("instance", INSTANCE_PROMPT), class_images=images("class", CLASS_PROMPT),
        )  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """Seconds per step and the peak memory of one side."""

    seconds: float
    peak_bytes: int
    before: float = 0.0
    """Seconds until the first step."""
    after: float = 0.0
    """Seconds from the last step to the saved model."""


def time_steps(run: Callable[[int], int], *, steps: int) -> Timed:
    """Return a peer's seconds per step as the difference of a short and a long run; `run` returns its peak memory."""
    short = max(2, steps // 5)
    started = time.monotonic()
    run(short)
    middle = time.monotonic()
    peak = run(short + steps)
    ended = time.monotonic()
    return Timed(((ended - middle) - (middle - started)) / steps, peak)


def time_run(case: Case, *, steps: int, **changes: Any) -> Timed:
    """Train once; the seconds per step are the worker's own, without those up to the first log line."""
    marks, rates = [time.monotonic()], list[float]()

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            marks.append(time.monotonic())
        elif event["event"] == "step":
            rates.append(event["images_per_second"])
            marks[2:] = [time.monotonic()]

    with tempfile.TemporaryDirectory() as name:
        spec = case.spec(Path(name) / "run", steps=steps, **changes)
        result = run_worker(spec, on_event=note)
    images = spec.training.train_batch_size * (2 if spec.training.prior_loss_weight else 1)
    # Equally many steps lie between two log lines: the mean of their seconds.
    seconds = sum(images / rate for rate in rates[1:]) / (len(rates) - 1)
    return Timed(seconds, result.peak_memory_bytes, before=marks[1] - marks[0], after=time.monotonic() - marks[2])


PEER_RUNNER = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("PEAK", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


def run_peer(script: Path, case: Case, *, steps: int) -> int:
    """Train with diffusers' script and return the peak memory of its process."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-c", PEER_RUNNER, str(script), "--pretrained_model_name_or_path", str(case.model),
            "--instance_data_dir", str(case.halves["instance"]), "--class_data_dir", str(case.halves["class"]),
            "--instance_prompt", INSTANCE_PROMPT, "--class_prompt", CLASS_PROMPT, "--with_prior_preservation",
            "--num_class_images", str(len(list(case.halves["class"].iterdir()))), "--train_text_encoder",
            "--resolution", str(case.resolution), "--center_crop", "--train_batch_size", str(case.batch_size),
            "--learning_rate", "2e-6", "--lr_scheduler", "constant", "--lr_warmup_steps", "0",
            "--max_train_steps", str(steps), "--checkpointing_steps", "100000", "--output_dir", out, "--seed", "1",
            "--mixed_precision", {"fp32": "no"}.get(case.precision, case.precision), "--allow_tf32",
        ]  # fmt: skip
        paths = os.pathsep.join(filter(None, [os.environ.get("PEER_PYTHONPATH"), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths,
        }  # fmt: skip
        log = Path(out) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            peak = watch_memory(process)
        if process.returncode:
            raise SystemExit(f"the peer failed:\n{log.read_text()[-3000:]}")
        allocated = int(log.read_text().rsplit("PEAK ", 1)[1].split()[0])
    return allocated or peak


def watch_memory(process: "subprocess.Popen[bytes]") -> int:
    """Return the largest resident memory of a process until it ends."""
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.2)
    process.wait()
    return peak


def profile_step(case: Case, *, num: int = 8) -> tuple[dict[str, float], float]:
    """Return seconds of a step's parts, and its floating-point operations."""
    with tempfile.TemporaryDirectory() as name:
        spec = case.spec(Path(name) / "run", steps=num)
        module = DreamBoothModule(load_model(spec.diffusion, folder=case.model), spec)
        batches = DreamBoothDataModule(module.model, spec).make_batches()
        module.configure_model()
        module.configure_optimizers()
    device = module.model.device
    parts = dict.fromkeys(("drawing the batch", "text encoder", "denoiser", "backward", "optimizer"), 0.0)

    def timed(part: str, call: Callable[[], Any]) -> Any:
        synchronize()
        started = time.monotonic()
        value = call()
        synchronize()
        parts[part] += time.monotonic() - started
        return value

    def step(index: int) -> None:
        with torch.autocast(device.type, DTYPES[case.precision], enabled=case.precision != "fp32"):
            rows = list(range(index * case.batch_size, (index + 1) * case.batch_size))
            [batch] = timed("drawing the batch", lambda: batches.make(rows, device))
            conditioning = timed("text encoder", lambda: module.encode_unique(batch))
            noise = module.model.noise_scheduler
            noisy = noise.add_noise(batch.latents, batch.noise, batch.timesteps)
            target = noise.compute_target(batch.latents, batch.noise, batch.timesteps)
            predicted = timed(
                "denoiser", lambda: module.model.predict(noisy, batch.timesteps, conditioning, time_ids=batch.time_ids)
            )
            loss = prior_preservation_loss(predicted, target, prior_loss_weight=1.0).total
        timed("backward", loss.backward)  # type: ignore[no-untyped-call]
        timed("optimizer", lambda: (module.optimizer.step(), module.optimizer.zero_grad(set_to_none=True)))

    step(0)
    counter = FlopCounterMode(display=False)
    with counter:
        step(1)
    parts.update(dict.fromkeys(parts, 0.0))
    for index in range(2, 2 + num):
        step(index)
    return {part: seconds / num for part, seconds in parts.items()}, float(counter.get_total_flops())


def measure_matrix_rate(precision: str) -> float:
    """Return the machine's operations per second in a large matrix product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, num = (8192, 50) if device == "cuda" else (2048, 10)
    left = torch.randn(side, side, device=device, dtype=DTYPES[precision])
    torch.mm(left, left)
    synchronize()
    started = time.monotonic()
    for _ in range(num):
        torch.mm(left, left)
    synchronize()
    return num * 2 * side**3 / (time.monotonic() - started)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def open_folder(kept: Path | None) -> Iterator[Path]:
    """Yield the folder of the benches' model and images: a temporary one, unless it is to be kept."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def make_model(name: str, folder: Path) -> Path:
    """Return the folder of a model that is measured, made there unless it was before."""
    path = folder / name
    if (path / "model_index.json").is_file():
        return path
    return make_mini(path) if name == "mini" else make_sd15(path)


def make_mini(folder: Path) -> Path:
    """Write the mini model in full precision: the peer takes no other."""
    load_model(make_config(DiffusionConfig, pretrained_model_name_or_path="mini", resolution=64)).save(folder)
    return folder


def make_sd15(folder: Path) -> Path:
    """Write the architecture of Stable Diffusion 1.5 with random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MINI_FOLDER / "base" / "tokenizer", model_max_length=77)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        ),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
            )
        ),
        tokenizer=tokenizer, scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


LEVERS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "without class images": {"prior_loss_weight": 0.0},
    "text encoder frozen": {"train_text_encoder": False},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"method": "lora"},
    "deterministic (the default)": {"deterministic": True},
    "a checkpoint every 10 steps": {"checkpointing_steps": 10},
    "averaged weights (EMA)": {"ema_decay": 0.999},
    "8-bit AdamW": {"optimizer": "adamw8bit"},
}
GPU_LEVERS: dict[str, dict[str, Any]] = {
    "channels last": {"channels_last": True},
    "compiled blocks": {"compile": True},
    "fp16": {"mixed_precision": "fp16"},
    "fp32": {"mixed_precision": "no"},
    "fp32 without TF32": {"mixed_precision": "no", "allow_tf32": False},
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training", description=__doc__)
    parser.add_argument("--model", choices=("mini", "sd15"), default="sd15" if torch.cuda.is_available() else "mini")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, help="instance images a step (default: 4 for mini, 1 for sd15)")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--peer", type=Path, help="diffusers' examples/dreambooth/train_dreambooth.py")
    parser.add_argument("--levers", action="store_true", help="measure settings too, one run each")
    parser.add_argument("--folder", type=Path, help="where the model is made, and found by the next bench")
    options = parser.parse_args()
    assert "fish" in CLASS_NOUNS
    with open_folder(options.folder) as folder:
        is_mini = options.model == "mini"
        case = Case(
            model=make_model(options.model, folder),
            resolution=64 if is_mini else 512,
            batch_size=options.batch_size or (4 if is_mini else 1),
            precision=options.precision or ("bf16" if torch.cuda.is_available() else "fp32"),
            folder=folder,
        )
        case.draw_images()
        report(case, options)


def report(case: Case, options: argparse.Namespace) -> None:
    """Measure and print every table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "pytorch-lightning"))
    print(
        f"{options.model}, {case.resolution} px, {case.batch_size}+{case.batch_size} images a step, {case.precision}, "
        f"UNet and text encoder trained; {device}, {platform.machine()}; {versions}; {time.strftime('%Y-%m-%d')}\n"
    )
    ours = time_run(case, steps=options.steps)
    rows = [("ours", ours)]
    if options.peer:
        peer = time_steps(lambda steps: run_peer(options.peer, case, steps=steps), steps=options.steps)
        again = time_run(case, steps=options.steps)
        ours = Timed((ours.seconds + again.seconds) / 2, max(ours.peak_bytes, again.peak_bytes))
        rows = [("ours (mean of a run before and one after)", ours), ("diffusers' train_dreambooth.py", peer)]
    print("| | s/step | images/s | peak memory |\n|---|---|---|---|")
    for label, timed in rows:
        rate = 2 * case.batch_size / timed.seconds
        print(f"| {label} | {timed.seconds:.3f} | {rate:.1f} | {timed.peak_bytes / 2**30:.2f} GiB |")
    if options.peer:
        print(f"\nratio: {peer.seconds / ours.seconds:.2f}x the peer's speed, "
              f"{ours.peak_bytes / peer.peak_bytes:.2f}x its memory\n")  # fmt: skip
    parts, flops = profile_step(case)
    rate = measure_matrix_rate(case.precision)
    waiting = max(0.0, ours.seconds - sum(parts.values()))
    print("\n| part of a step | seconds | share |\n|---|---|---|")
    for part, seconds in {**parts, "loop and waiting": waiting}.items():
        print(f"| {part} | {seconds:.4f} | {seconds / ours.seconds:.0%} |")
    print(f"\n{flops / 1e9:.1f} GFLOP a step: {flops / ours.seconds / rate:.0%} of the matrix rate measured here "
          f"({rate / 1e12:.2f} TFLOP/s, {case.precision})\n")  # fmt: skip
    if options.levers:
        measure_levers(case, steps=options.steps)


def measure_levers(case: Case, *, steps: int) -> None:
    """Print what each setting costs, one run each, and what `likeness estimate` predicts for it."""
    print("| setting | s/step | ratio | peak memory | estimated | start, s | end, s |\n|---|---|---|---|---|---|---|")
    plain = None
    for label, changes in {**LEVERS, **(GPU_LEVERS if torch.cuda.is_available() else {})}.items():
        timed = time_run(case, steps=steps, **changes)
        plain = plain or timed
        spec = case.spec(case.folder, steps=steps, **changes)
        estimated = estimate_memory(case.model, spec.diffusion, spec.training).total
        print(f"| {label} | {timed.seconds:.3f} | {timed.seconds / plain.seconds:.2f} | "
              f"{timed.peak_bytes / 2**30:.2f} GiB | {estimated / 2**30:.2f} GiB | {timed.before:.1f} | "
              f"{timed.after:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

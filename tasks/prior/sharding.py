"""Draw class images on several devices at once: one process each, every image from its own seed."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tasks.config_base import Section
from tasks.diffusion.config import DiffusionConfig
from tasks.errors import ConfigError
from tasks.prior.config import PriorConfig
from tasks.stage.worker_process import child_environment, guarded

POLL_SECONDS = 0.2


class Shard(Section):
    """What one process draws; it reads no other configuration."""

    diffusion: DiffusionConfig
    prior: PriorConfig
    class_prompt: str
    seeds: tuple[int, ...]
    folder: str


def draw_on_devices(
    diffusion: DiffusionConfig, config: PriorConfig, *, class_prompt: str, seeds: list[int]
) -> Iterator[tuple[int, Image.Image]]:
    """Yield each seed with its picture as the processes finish them.

    Raises:
        ConfigError: a process failed; names the device and its last words.

    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        processes = [
            start(Shard(
                diffusion=diffusion, prior=config, class_prompt=class_prompt,
                seeds=tuple(seeds[device :: config.num_devices]), folder=str(out),
            ), device)
            for device in range(min(config.num_devices, len(seeds)))
        ]  # fmt: skip
        waiting = set(seeds)
        try:
            while waiting:
                for seed in sorted(waiting):
                    path = out / f"{seed}.png"
                    if path.exists():
                        waiting.remove(seed)
                        yield seed, Image.open(path)
                check(processes, out, is_done=not waiting)
                time.sleep(POLL_SECONDS if waiting else 0)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def start(shard: Shard, device: int) -> "subprocess.Popen[bytes]":
    """Start one process that sees one device."""
    out = Path(shard.folder)
    spec = out / f"shard-{device}.json"
    spec.write_text(shard.model_dump_json())
    environment = child_environment(CUDA_VISIBLE_DEVICES=pick_device(device))
    with (out / f"shard-{device}.log").open("wb") as log:
        return subprocess.Popen(guarded("tasks.prior.worker", str(spec)), stdout=log, stderr=log, env=environment)


def pick_device(device: int) -> str:
    """Return what the n-th process may see, of the devices that this one sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return str(device)
    visible = [name for name in named.split(",") if name]
    return visible[device % len(visible)] if visible else ""


def check(processes: "list[subprocess.Popen[bytes]]", out: Path, *, is_done: bool) -> None:
    """Raise ConfigError where a process ended badly before its pictures were there."""
    for device, process in enumerate(processes):
        if process.poll() and not is_done:
            words = (out / f"shard-{device}.log").read_text().strip().splitlines() or ["it said nothing"]
            raise ConfigError(f"drawing class images on device {device} failed: {words[-1]}; see prior.batch_size")

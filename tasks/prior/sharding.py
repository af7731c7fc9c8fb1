"""Generate class images on several devices: one process per device, each image from its own seed."""

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
    """The work of one process; it reads no other configuration."""

    diffusion: DiffusionConfig
    prior: PriorConfig
    class_prompt: str
    seeds: tuple[int, ...]
    folder: str


def generate_on_devices(
    diffusion: DiffusionConfig, config: PriorConfig, *, class_prompt: str, seeds: list[int]
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (seed, image) as the processes finish them, so that each is stored at once.

    Raises:
        ConfigError: a process failed; names the device and the last line of its log.

    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        processes = [
            start(Shard(
                diffusion=diffusion, prior=config, class_prompt=class_prompt,
                # Strided, so that devices get equal shares.
                seeds=tuple(seeds[device :: config.num_devices]), folder=str(out),
            ), device)
            for device in range(min(config.num_devices, len(seeds)))
        ]  # fmt: skip
        waiting = set(seeds)
        try:
            while waiting:
                for seed in sorted(waiting):
                    path = out / f"{seed}.png"
                    if path.exists():  # renamed into place by the worker, so complete
                        waiting.remove(seed)
                        yield seed, Image.open(path)
                check(processes, out, is_done=not waiting)
                time.sleep(POLL_SECONDS if waiting else 0)
        finally:  # also where the consumer closes the generator early
            for process in processes:
                process.kill()
                process.wait()


def start(shard: Shard, device: int) -> "subprocess.Popen[bytes]":
    """Start one process with a single visible device."""
    out = Path(shard.folder)
    spec = out / f"shard-{device}.json"
    spec.write_text(shard.model_dump_json())
    environment = child_environment(CUDA_VISIBLE_DEVICES=pick_device(device))
    with (out / f"shard-{device}.log").open("wb") as log:  # the child holds a duplicate of the descriptor
        return subprocess.Popen(guarded("tasks.prior.worker", str(spec)), stdout=log, stderr=log, env=environment)


def pick_device(device: int) -> str:
    """Return `CUDA_VISIBLE_DEVICES` of the n-th process, within the devices visible to this one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return str(device)
    # Entries are indices or UUIDs and are passed on as they are.
    visible = [name for name in named.split(",") if name]
    return visible[device % len(visible)] if visible else ""


def check(processes: "list[subprocess.Popen[bytes]]", out: Path, *, is_done: bool) -> None:
    """Raise ConfigError where a process failed before all images were written."""
    for device, process in enumerate(processes):
        if process.poll() and not is_done:  # None while it runs, 0 on success
            words = (out / f"shard-{device}.log").read_text().strip().splitlines() or ["its log is empty"]
            raise ConfigError(f"generating class images on device {device} failed: {words[-1]}; see prior.batch_size")

"""Sample on several devices: one process per device, each image from its own seed."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tasks.config_base import Section
from tasks.diffusion.sampling.job import IndexedImage, SamplingJob, sample_in_batches
from tasks.errors import ConfigError
from tasks.stage.worker_process import child_environment, guarded

POLL_SECONDS = 0.2
JOB_FILE = "job.json"


class Shard(Section):
    """The share of one process."""

    rank: int
    num_processes: int
    folder: str
    """Of the job's file and the images."""


def sample(job: SamplingJob, *, num_devices: int) -> Iterator[IndexedImage]:
    """Yield each image with its request's position, as soon as it is there.

    Raises:
        ConfigError: the model can't be loaded, or a process failed; names the device.

    """
    num = min(num_devices, len(job.requests))
    return sample_on_devices(job, num_devices=num) if num > 1 else sample_in_batches(job.load(), job)


def count_devices(setting: int) -> int:
    """Return the devices that a setting means: 0 is all GPUs, or the CPU where there are none."""
    import torch

    return setting or max(1, torch.cuda.device_count())


def note_devices(num: int) -> dict[str, int]:
    """Return a stage's count of devices; one goes without saying."""
    return {"devices": num} if num > 1 else {}


def sample_on_devices(job: SamplingJob, *, num_devices: int) -> Iterator[IndexedImage]:
    """Yield (position, image) as the processes finish them, so that each is stored at once.

    Raises:
        ConfigError: a process failed; names the device and the last line of its log.

    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        (out / JOB_FILE).write_text(job.model_dump_json())
        processes: list[subprocess.Popen[bytes]] = []
        waiting = set(range(len(job.requests)))
        try:
            for rank in range(num_devices):
                processes.append(start(Shard(rank=rank, num_processes=num_devices, folder=name)))
            while waiting:
                has_ended = all(process.poll() is not None for process in processes)
                for position in sorted(waiting):
                    path = out / f"{position}.png"
                    if path.exists():  # renamed into place by the worker, so complete
                        with Image.open(path) as picture:
                            picture.load()
                        waiting.remove(position)
                        path.unlink()
                        yield position, picture
                if waiting:
                    check(processes, out, has_ended=has_ended)
                    time.sleep(POLL_SECONDS)
        finally:  # also where the consumer closes the generator early
            for process in processes:
                process.kill()
                process.wait()


def start(shard: Shard) -> "subprocess.Popen[bytes]":
    """Start one process with a single visible device."""
    out = Path(shard.folder)
    spec = out / f"shard-{shard.rank}.json"
    spec.write_text(shard.model_dump_json())
    environment = child_environment(CUDA_VISIBLE_DEVICES=pick_device(shard.rank))
    with (out / f"shard-{shard.rank}.log").open("wb") as log:  # the child holds a duplicate of the descriptor
        command = guarded("tasks.diffusion.sampling.worker", str(spec))
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def pick_device(rank: int) -> str:
    """Return `CUDA_VISIBLE_DEVICES` of the n-th process, within the devices visible to this one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return str(rank)
    # Entries are indices or UUIDs and are passed on as they are.
    visible = [name for name in named.split(",") if name]
    return visible[rank % len(visible)] if visible else ""


def check(processes: "list[subprocess.Popen[bytes]]", out: Path, *, has_ended: bool) -> None:
    """Raise ConfigError where a process failed, or all had ended before the images were looked for."""
    for rank, process in enumerate(processes):
        if process.poll() or has_ended:  # None while it runs, 0 on success
            words = (out / f"shard-{rank}.log").read_text(errors="replace").strip().splitlines()
            reason = words[-1] if words else "its log is empty"
            raise ConfigError(f"sampling on device {rank} failed: {reason}; see batch_size and num_devices")

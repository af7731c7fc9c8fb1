"""Sample on several devices: one process per device, each image from its own seed."""

import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from tasks.config_base import Section
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.device import choose_device, count_gpus, list_devices, lock_devices
from tasks.diffusion.sampling.job import IndexedImage, SamplingJob, sample_in_batches
from tasks.errors import ConfigError
from tasks.redaction import clean_text
from tasks.stage.worker_process import child_environment, guarded

POLL_SECONDS = 0.2
JOB_FILE = "job.json"


class Shard(Section):
    """The share of one process."""

    rank: int
    num_processes: int
    folder: str
    """Of the job's file and the images."""


@dataclass(frozen=True)
class Devices:
    """How many devices a stage samples on, and the setting that says so."""

    setting: str
    num: int

    def limit(self, job: SamplingJob) -> int:
        """Return the processes of a job: at least a batch for each, since each loads the model."""
        return max(1, min(self.num, math.ceil(len(job.requests) / job.batch_size)))

    def counts(self) -> dict[str, int]:
        """Return what a stage records of them; a single device is not recorded."""
        return {"devices": self.num} if self.num > 1 else {}


def find_devices(setting: str, num_devices: int, *, diffusion: DiffusionConfig) -> Devices:
    """Resolve a stage's `num_devices`; 0 means every visible GPU, or the CPU.

    Raises:
        ConfigError: more GPUs are configured than there are.

    """
    if choose_device(diffusion).type != "cuda":
        return Devices(setting, num_devices or 1)
    gpus = count_gpus()
    if num_devices > gpus:
        raise ConfigError(f"{setting}={num_devices}, but {gpus} GPUs are visible; set {setting}=0 to use them")
    return Devices(setting, num_devices or gpus)


@contextmanager
def hold(devices: Devices, diffusion: DiffusionConfig, *, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Lock the GPUs of a stage: a training of another run may need all of their memory.

    `on_wait` is called every second with what is waited for; it raises to give up.
    """
    from tasks.diffusion.adapter import release_memory

    is_gpu = choose_device(diffusion).type == "cuda"
    with lock_devices(list_devices(devices.num, diffusion) if is_gpu else [], on_wait=on_wait):
        try:
            yield
        finally:
            release_memory()


def sample(job: SamplingJob, devices: Devices) -> Generator[IndexedImage, None, None]:
    """Yield each image with its request's position, as soon as it is there.

    Raises:
        ConfigError: the model can't be loaded, or a process failed; names the device.

    """
    from tasks.diffusion.adapter import release_memory

    num = devices.limit(job)
    try:
        yield from (sample_on_devices(job, replace(devices, num=num)) if num > 1 else sample_here(job))
    finally:
        release_memory()  # the next model may be loaded by another process


def sample_here(job: SamplingJob) -> Iterator[IndexedImage]:
    """Yield (position, image), sampled by this process, which lets go of the model at the end."""
    yield from sample_in_batches(job.load(), job)


def sample_on_devices(job: SamplingJob, devices: Devices) -> Iterator[IndexedImage]:
    """Yield (position, image) as the processes finish them, so that each is stored at once.

    Raises:
        ConfigError: a process failed; names the device and the last line of its log.

    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        (out / JOB_FILE).write_text(job.model_dump_json(), encoding="utf-8")
        processes: list[subprocess.Popen[bytes]] = []
        waiting = set(range(len(job.requests)))
        try:
            for rank in range(devices.num):
                processes.append(start(Shard(rank=rank, num_processes=devices.num, folder=name)))
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
                    check([process.poll() for process in processes], out, setting=devices.setting)
                    if has_ended:
                        raise ConfigError(f"sampling ended without {len(waiting)} images; see {devices.setting}")
                    time.sleep(POLL_SECONDS)
        finally:  # also where the consumer closes the generator early
            for process in processes:
                process.kill()
                process.wait()


def start(shard: Shard) -> "subprocess.Popen[bytes]":
    """Start one process with a single visible device."""
    out = Path(shard.folder)
    spec = out / f"shard-{shard.rank}.json"
    spec.write_text(shard.model_dump_json(), encoding="utf-8")
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


def check(codes: Sequence[int | None], out: Path, *, setting: str) -> None:
    """Raise ConfigError for the first process that failed: with its exit code, and the last line of its log."""
    for rank, code in enumerate(codes):
        if code:  # None while it runs, 0 on success
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            words = (out / f"shard-{rank}.log").read_text(errors="replace").strip().splitlines() or ["its log is empty"]
            hint = "; it may lack memory" if code == -signal.SIGKILL else ""
            raise ConfigError(
                f"sampling on device {rank} failed ({ended}): {clean_text(words[-1])}{hint}; "
                f"see batch_size and {setting}"
            )

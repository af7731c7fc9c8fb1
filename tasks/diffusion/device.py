"""Resolve the configured device, and lock it: one training or sampling per GPU of a host.

The locks are the operating system's, which end with their processes.
"""

import fcntl
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.diffusion.config import DiffusionConfig
from tasks.errors import ConfigError
from tasks.manifests.base import Machine

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 1.0
COMPUTING = ("torch", "diffusers", "transformers")
"""Packages whose versions a stage records."""
DRIVER = Path("/dev/nvidiactl")


def choose_device(config: DiffusionConfig) -> "torch.device":
    """Return the device to compute on. Raises ConfigError for cuda without a GPU."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("diffusion.device=cuda, but torch sees no GPU; set diffusion.device=auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def describe_device(config: DiffusionConfig) -> str:
    """Return the kind of device to compute on: the name of the GPU, or cpu."""
    import torch

    device = choose_device(config)
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def describe_machine(device: str, *, num_devices: int) -> Machine:
    """Return where a stage is computed: this machine, with the versions of the packages that compute."""
    versions = {"Python": platform.python_version(), **{name: version(name) for name in COMPUTING}}
    system = f"{platform.system()} {platform.machine()}"
    return Machine(system=system, device=device, num_devices=num_devices, versions=versions)


def count_gpus() -> int:
    """Return the number of visible GPUs, at least 1: the CPU counts as one device."""
    import torch

    return max(1, torch.cuda.device_count())


def list_devices(
    num_devices: int, diffusion: DiffusionConfig, *, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """Return the names of the first GPUs of this host that this process sees; none where the CPU computes.

    Numbered as the driver does: `CUDA_VISIBLE_DEVICES` renumbers them for each process.
    """
    if diffusion.device == "cpu" or not DRIVER.exists():
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(num_devices)]
    names = [name.strip() for name in visible.split(",")]
    # As the driver reads it: an entry that is no device ends the list, so "" and -1 hide all.
    return list(itertools.takewhile(lambda name: name and name != "-1", names))[:num_devices]


def count_slots(names: Sequence[str]) -> int:
    """Return how many slots of its host a training takes: its whole GPUs, or one where the host has none."""
    return sum(not name.startswith("MIG-") for name in names) if DRIVER.exists() else 1


@contextmanager
def lock_devices(
    names: Sequence[str], *, on_wait: Callable[[str], None], folder: Path | None = None
) -> Iterator[tuple[int, ...]]:
    """Hold the locks of some GPUs, after waiting for those that compute on them; yield the locks' file descriptors.

    A training worker inherits the descriptors: a GPU stays locked while an orphaned one still computes on it.

    Args:
        names: of GPUs, as `list_devices` returns them.
        on_wait: called every second with what is waited for; raises to give up.
        folder: where lock files lie; None is the host's folder of temporary files, so that all runs share them.

    """
    # Not in the output folder: runs with different ones share the GPU. One folder per user, whose files are its own.
    folder = folder or Path(tempfile.gettempdir()) / f"likeness-{os.getuid()}"
    with ExitStack() as stack:
        descriptors = []
        # Sorted, so that two runs that want the same GPUs can't wait for each other.
        for name in sorted(names):
            folder.mkdir(mode=0o700, exist_ok=True)
            file = stack.enter_context((folder / f"gpu-{name.replace('/', '_')}.lock").open("a+"))
            while not try_lock(file.fileno()):
                file.seek(0)
                holder = file.read(200).strip()
                on_wait(f"GPU {name}" + (f", which process {holder} uses" if holder.isdigit() else ""))
                time.sleep(POLL_SECONDS)
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
            descriptors.append(file.fileno())
        yield tuple(descriptors)


def try_lock(descriptor: int) -> bool:
    """Lock a file without waiting; return whether it is locked now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

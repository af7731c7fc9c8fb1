"""One training or sampling per GPU: others wait and say for whom; a lock ends with its processes."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.diffusion import device
from tasks.diffusion.device import list_devices, lock_devices
from tasks.errors import LikenessError
from tests.support.tiny import tiny_diffusion_config


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Poll often, on a host with a driver."""
    monkeypatch.setattr(device, "POLL_SECONDS", 0.02)
    (tmp_path / "driver").touch()
    monkeypatch.setattr(device, "DRIVER", tmp_path / "driver")


def give_up(what: str) -> None:
    raise LikenessError(what)


HOLDER = """
import sys, time
from pathlib import Path
from tasks.diffusion.device import lock_devices
with lock_devices(["0"], on_wait=print, folder=Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_training_on_a_gpu_waits_until_the_first_process_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        message = f"GPU 0, which process {holder.pid} uses"
        with pytest.raises(LikenessError, match=message), lock_devices(["0"], on_wait=give_up, folder=tmp_path):
            pass
        with lock_devices(["1"], on_wait=give_up, folder=tmp_path):  # another GPU is free
            pass
        holder.kill()
    with lock_devices(["0"], on_wait=lambda what: None, folder=tmp_path) as descriptors:
        assert len(descriptors) == 1


def test_trainings_on_overlapping_gpus_do_not_deadlock(tmp_path: Path) -> None:
    done: list[str] = []

    def work(*names: str) -> None:
        for _ in range(20):
            with lock_devices(names, on_wait=lambda what: None, folder=tmp_path):
                time.sleep(0.001)
        done.append("".join(names))

    threads = [threading.Thread(target=work, args=names) for names in (("0", "1"), ("1", "0"), ("1", "2"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == ["01", "10", "12"]


@pytest.mark.parametrize(
    ("num_devices", "visible", "device", "expected"),
    [
        (1, None, "auto", ["0"]),
        (2, None, "cuda", ["0", "1"]),
        (2, "3,5,7", "auto", ["3", "5"]),
        (1, "GPU-5e1f", "auto", ["GPU-5e1f"]),
        (1, "", "auto", []),
        (2, "-1", "auto", []),
        (2, "1,-1,2", "auto", ["1"]),
        (1, None, "cpu", []),
    ],
)
def test_the_locked_gpus_are_those_that_the_process_sees(
    tmp_path: Path, num_devices: int, visible: str | None, device: str, expected: list[str]
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    diffusion = tiny_diffusion_config(tmp_path, device=device)
    assert list_devices(num_devices, diffusion, environment=environment) == expected


def test_nothing_is_locked_on_a_host_without_gpu(tmp_path: Path) -> None:
    (tmp_path / "driver").unlink()
    assert list_devices(1, tiny_diffusion_config(tmp_path, device="auto")) == []

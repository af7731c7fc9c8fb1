"""How many devices sample, which, and what is said of one that fails."""

import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from conf.compose import compile_request
from conf.overrides import parse_overrides
from tasks.diffusion import device
from tasks.diffusion.sampling.devices import Devices, check, find_devices, hold, pick_device
from tasks.diffusion.sampling.job import SamplingJob
from tasks.diffusion.types import SamplingRequest
from tasks.errors import ConfigError, LikenessError
from tests.support.tiny import tiny_diffusion_config

NAME = "evaluation.num_devices"


def make_job(num: int, *, batch_size: int) -> SamplingJob:
    return SamplingJob(
        diffusion=tiny_diffusion_config(Path("unused")),
        requests=tuple(SamplingRequest(prompt="a fish", seed=seed) for seed in range(num)),
        num_inference_steps=1,
        guidance_scale=1.0,
        batch_size=batch_size,
    )


def test_zero_means_every_gpu_or_the_cpu_and_more_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = tiny_diffusion_config(Path("unused")).model_copy(update={"device": "auto"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [find_devices(NAME, num, diffusion=diffusion).num for num in (0, 1, 3)] == [1, 1, 3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [find_devices(NAME, num, diffusion=diffusion).num for num in (0, 1, 4)] == [4, 1, 4]
    on_cpu = diffusion.model_copy(update={"device": "cpu"})
    assert find_devices(NAME, 0, diffusion=on_cpu).num == 1
    with pytest.raises(
        ConfigError, match="evaluation.num_devices=5, but 4 GPUs are visible; set evaluation.num_devices=0"
    ):
        find_devices(NAME, 5, diffusion=diffusion)
    assert [Devices(NAME, num).counts() for num in (1, 4)] == [{}, {"devices": 4}]


@pytest.mark.parametrize(
    ("images", "batch_size", "processes"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (64, 8, 4), (3, 1, 3)]
)
def test_no_process_is_started_for_less_than_a_batch(images: int, batch_size: int, processes: int) -> None:
    assert Devices(NAME, 4).limit(make_job(images, batch_size=batch_size)) == processes


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1", "2"]), ("3,GPU-5e", ["3", "GPU-5e", "3"]), ("", ["", "", ""])]
)
def test_each_process_sees_one_of_the_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [pick_device(rank) for rank in range(3)] == expected


def test_the_device_that_failed_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "shard-0.log").write_text("")
    (tmp_path / "shard-1.log").write_text("Traceback\nOutOfMemoryError: \x1b[31mCUDA out of memory\n")
    check([0, None], tmp_path, setting=NAME)
    with pytest.raises(ConfigError, match=r"device 1 failed \(exit code 1\): OutOfMemoryError: .*CUDA") as caught:
        check([0, 1], tmp_path, setting=NAME)
    assert str(caught.value).endswith("see batch_size and evaluation.num_devices")
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"device 0 failed \(signal 9\): its log is empty; it may lack memory"):
        check([-signal.SIGKILL, None], tmp_path, setting=NAME)


@pytest.mark.parametrize(("name", "num"), [("one", 1), ("all", 0), ("sharded", 0), ("nodes", 0)])
def test_the_devices_of_training_sample_too(name: str, num: int) -> None:
    words = ["training.rdzv_endpoint=gpu-1:29500"] if name == "nodes" else []
    config = compile_request(parse_overrides([f"training/devices={name}", *words]))
    found = (config.training.num_devices, config.prior.num_devices, config.evaluation.num_devices)
    assert found == (num, num, num)


def test_a_stage_waits_for_a_gpu_that_another_run_uses_and_locks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the locks lie
    monkeypatch.setattr(device, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    diffusion = tiny_diffusion_config(tmp_path).model_copy(update={"device": "auto"})

    def give_up(what: str) -> None:
        raise LikenessError(what)

    def use(num: int) -> None:
        with hold(Devices(NAME, num), diffusion, on_wait=give_up):
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    message = f"GPU 1, which process {os.getpid()} uses"
    with device.lock_devices(["1"], on_wait=give_up):
        use(1)
        with pytest.raises(LikenessError, match=message):
            use(2)
    with (
        hold(Devices(NAME, 2), diffusion, on_wait=give_up),
        pytest.raises(LikenessError, match=message),
        device.lock_devices(["1"], on_wait=give_up),
    ):
        pass
    use(2)  # free again
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with device.lock_devices(["0"], on_wait=give_up):
        use(1)  # on the CPU

"""A metric of another package is measured where the package is installed."""

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.errors import ConfigError
from tasks.evaluation.measurement import Registry, measure_each
from tasks.evaluation.metrics import Features
from tasks.evaluation.own_metrics import identify_own_metrics, load_own_metrics
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Sample
from tests.support.cli_sandbox import ROOT

CODE = '''
"""Metrics of a test."""

from tasks.evaluation.own_metrics import OwnMetric
from tasks.metrics import Metric


def redness(samples, photos):
    """Mean red level of a sample, 0 to 1.

    More follows.
    """
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in samples.images]


def too_few(samples, photos):
    return [1.0]


def broken(samples, photos):
    raise RuntimeError("no weights")


def scalar(samples, photos):
    return 0.5


def text(samples, photos):
    return "12"


def texts(samples, photos):
    return ["1", "2"]


def table(samples, photos):
    return samples.dino[:, :2]


def single(samples, photos):
    return samples.dino.sum()


def imaginary(samples, photos):
    return [1j, 2j]


def huge(samples, photos):
    return [1.0, 1e13]


def endless(samples, photos):
    return [1.0, float("inf")]


def stops(samples, photos):
    yield 1.0
    raise RuntimeError("out of samples")


calls = []


def sometimes(samples, photos):
    calls.append(1)
    return None if len(calls) == 1 else [1.0] * len(samples.dino)


partial = OwnMetric(Metric("Partial", "t", "nothing", level="prompt"), sometimes)
described = OwnMetric(Metric("Redness", "as redness", "nothing", direction="lower"), redness)
number = 3
'''


DREAMSIM = '''
"""As dreamsim 0.2.1: the signature of its function and the shapes of what it returns; embeds the mean color."""

import numpy as np
import torch

loaded = []


class PerceptualModel(torch.nn.Module):
    def embed(self, img):
        assert img.shape == (1, 3, 224, 224) and 0 <= img.min() and img.max() <= 1
        return torch.nn.functional.normalize(img.mean((2, 3)), dim=1)


def dreamsim(pretrained: bool = True, device="cuda", cache_dir="./models", normalize_embeds: bool = True,
             dreamsim_type: str = "ensemble", use_patch_model=False):
    loaded.append(device)

    def preprocess(pil_img):
        pixels = np.array(pil_img.convert("RGB").resize((224, 224)), np.float32) / 255
        return torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0)

    return PerceptualModel().eval().requires_grad_(False), preprocess
'''


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entries: str, *, module: str, code: str = CODE) -> None:
    """Install a distribution as `pip install --target` leaves it: a module and its metadata."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[likeness.metrics]\n{entries}\n")
    monkeypatch.syspath_prepend(folder)


def measure(colors: Sequence[tuple[int, int, int]] = ((0, 0, 0), (255, 0, 0))) -> dict[str, dict[str, float]]:
    """Measure pictures of one color each, which are the photos too."""
    import torch
    from PIL import Image

    num = len(colors)
    rows = torch.eye(num)
    pictures = tuple(Image.new("RGB", (8, 8), color) for color in colors)
    samples = [
        Sample(image=ObjectRef(key=f"k{number}", sha256="", size_bytes=0), side="tuned", kind="subject", prompt="",
               class_prompt="", seed=number, template=f"t{number}")
        for number in range(num)
    ]  # fmt: skip
    features = Features(rows, rows, rows, pictures)
    return measure_each(samples, features, features, registry=Registry().extended(load_own_metrics()))


def test_without_other_packages_there_are_no_own_metrics() -> None:
    assert load_own_metrics() == {}
    assert identify_own_metrics() == []


def test_an_installed_metric_is_measured_and_its_version_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "redness = metrics_a:redness\nredness2 = metrics_a:described", module="metrics_a")
    assert identify_own_metrics() == ["redness metrics_a 1.2", "redness2 metrics_a 1.2"]
    loaded = load_own_metrics()
    assert loaded["redness"].metric.text == "Mean red level of a sample, 0 to 1"
    assert (loaded["redness2"].metric.name, loaded["redness2"].metric.direction) == ("Redness", "lower")
    assert measure()["redness"] == {"k0": 0.0, "k1": 1.0}


def find_block(text: str, language: str, marker: str) -> str:
    """Return the only code block of a language that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    [found] = [block for block in blocks if marker in block]
    return str(found)


def test_the_readmes_example_of_a_metric_of_another_package_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text()
    project = tomllib.loads(find_block(readme, "toml", "likeness.metrics"))["project"]
    [(name, value)] = project["entry-points"]["likeness.metrics"].items()
    code = find_block(readme, "python", "import dreamsim")
    (tmp_path / "dreamsim.py").write_text(DREAMSIM)
    install(tmp_path, monkeypatch, f"{name} = {value}", module=value.partition(":")[0], code=code)
    for module in ("dreamsim", value.partition(":")[0]):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert load_own_metrics()[name].metric.text == "Mean DreamSim cosine to the photos"
    colors = [(255, 0, 0), (255, 255, 0)]
    found = measure(colors=colors)[name]
    assert found == pytest.approx({"k0": (1 + 0.5**0.5) / 2, "k1": (1 + 0.5**0.5) / 2})
    single = measure(colors=[(255, 0, 0), (0, 0, 255), (0, 0, 255)])[name]
    assert single == pytest.approx({"k0": 1 / 3, "k1": 2 / 3, "k2": 2 / 3})
    assert sys.modules["dreamsim"].loaded == ["cpu"], "the model is loaded once"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("dino = {0}:redness", "metric dino of {0} 1.2 has the name of another metric"),
        ("mine = {0}:missing", "metric mine of {0} 1.2 can't be imported"),
        ("mine = nowhere_at_all:redness", "can't be imported: No module named"),
        ("mine = {0}:number", "is no function"),
        ("mine = {0}:too_few", "metric mine returned 1 values for 2 samples"),
        ("mine = {0}:broken", "metric mine failed: RuntimeError: no weights"),
        ("mine = {0}:scalar", "metric mine returned a single float; return one number per sample"),
        ("mine = {0}:text", "metric mine returned a single str"),
        ("mine = {0}:single", "metric mine returned a single Tensor"),
        ("mine = {0}:table", r"metric mine returned an array of shape \(2, 2\)"),
        ("mine = {0}:texts", "metric mine returned a str for a sample; return real numbers"),
        ("mine = {0}:imaginary", "metric mine returned a complex for a sample"),
        ("mine = {0}:huge", r"metric mine returned 1e\+13; return values of at most 1e\+12"),
        ("mine = {0}:endless", "metric mine returned inf; return finite numbers"),
        ("mine = {0}:stops", "metric mine failed: RuntimeError: out of samples"),
        ("mine = {0}:partial", "metric mine returned None for 1 groups of samples, but not for all"),
        ("copy = {0}:redness", "metric copy of {0} 1.2 has a reserved name; rename it"),
        ("concept_preservation = {0}:redness", "has the name of a judge's axis; rename it"),
        ("my-metric = {0}:redness", "must be a Python identifier"),
    ],
)
def test_a_metric_that_cannot_be_used_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str, request: pytest.FixtureRequest
) -> None:
    module = f"metrics_{abs(hash(request.node.name)) % 10**8}"
    install(tmp_path, monkeypatch, entry.format(module), module=module)
    with pytest.raises(ConfigError, match=message.format(module)):
        measure()

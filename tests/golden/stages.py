"""A stage's result as the golden files hold it, and how two of them compare."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tasks.manifests.base import Manifest, without_stage_keys
from tasks.manifests.evaluation import Evaluation
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.publishing import Publication
from tasks.manifests.scoring import Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel
from tasks.stage.cache import compute_schema_digest

FOLDER = Path(__file__).parent
KINDS: dict[str, type[Manifest]] = {
    "subject": SubjectSet, "prior": ClassImageSet, "training": TunedModel,
    "evaluation": Evaluation, "scoring": Scorecard, "publishing": Publication,
}  # fmt: skip
LEFT_OUT = {
    "evidence", "tracking_run_id", "registered_version", "subject_sha256", "prior_sha256", "base_model", "size_bytes",
}  # fmt: skip
# Six steps of training and a few of denoising: a thousandth between CPUs, far less than any change of what is computed.
RELATIVE, ABSOLUTE = 0.01, 0.01
# The mini judge's grades are steps of what it measures: next to a limit, rounding moves one by a whole step.
GRADE = 1.01
# Mean absolute difference of pictures, in levels of 255.
LEVELS = 2.0


def describe(stage: str, manifest: Manifest) -> dict[str, Any]:
    """Return a manifest as the golden file holds it."""
    steps = importlib.import_module(f"tasks.{stage}.steps")
    plain = manifest.model_dump(mode="json", exclude=set(manifest.NOT_RESULT))
    return {
        "stage_version": steps.STAGE_VERSION,
        "schema_sha256": compute_schema_digest(KINDS[stage]),
        "result": simplify(without_stage_keys(plain)),
    }


def simplify(value: Any) -> Any:
    """Return plain data without what differs between machines and runs."""
    if isinstance(value, dict):
        if set(value) == {"key", "sha256", "size_bytes"}:
            return value["key"]
        return {name: simplify(child) for name, child in value.items() if name not in LEFT_OUT}
    return [simplify(child) for child in value] if isinstance(value, list) else value


def find_difference(golden: Any, found: Any, where: str = "", *, absolute: float = ABSOLUTE) -> str:
    """Return the first place where two results differ, or nothing."""
    if isinstance(golden, dict) and isinstance(found, dict):
        if set(golden) != set(found):
            return f"{where}: fields {sorted(set(golden) ^ set(found))}"
        pairs: list[tuple[Any, Any, Any]] = [(name, golden[name], found[name]) for name in golden]
    elif isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            return f"{where}: {len(golden)} items, now {len(found)}"
        pairs = [(number, *pair) for number, pair in enumerate(zip(golden, found, strict=True))]
    elif isinstance(golden, float) and isinstance(found, float | int):
        is_close = math.isclose(golden, found, rel_tol=RELATIVE, abs_tol=absolute)
        return "" if is_close else f"{where}: {golden}, now {found}"
    else:
        return "" if golden == found else f"{where}: {golden!r}, now {found!r}"
    differences = (find_difference(one, other, f"{where}/{name}", absolute=absolute) for name, one, other in pairs)
    return next(filter(None, differences), "")


def join_pictures(folder: Path) -> Image.Image | None:
    """Return a stage's pictures beside each other, in order of their names; None where it has none."""
    paths = sorted(path for path in folder.rglob("*.png") if "rejected" not in path.parts)
    pictures = [Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BOX) for path in paths]
    if not pictures:
        return None
    joined = Image.new("RGB", (64 * len(pictures), 64))
    for number, picture in enumerate(pictures):
        joined.paste(picture, (64 * number, 0))
    return joined


def find_picture_difference(golden: Path, found: Image.Image | None) -> str:
    """Return how pictures differ from the golden ones, or nothing."""
    if found is None or not golden.exists():
        return "" if found is None and not golden.exists() else "there are pictures on one side alone"
    with Image.open(golden) as opened:
        expected = np.asarray(opened.convert("RGB"), float)
    pixels = np.asarray(found, float)
    if expected.shape != pixels.shape:
        return f"pictures of {expected.shape}, now {pixels.shape}"
    mean = float(np.abs(expected - pixels).mean())
    return "" if mean <= LEVELS else f"pictures differ by {mean:.1f} levels of 255"


def read_golden(stage: str) -> dict[str, Any]:
    """Return a stage's golden file."""
    loaded: dict[str, Any] = json.loads((FOLDER / f"{stage}.json").read_text())
    return loaded

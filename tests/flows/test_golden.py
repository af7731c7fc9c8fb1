"""What every stage makes of the quick demo is what was committed, or its version is another."""

from pathlib import Path
from typing import Any

import pytest

from tasks.stage.digests import parse_json, verify_signed
from tests.golden.stages import (
    ABSOLUTE,
    FOLDER,
    GRADE,
    KINDS,
    describe,
    find_difference,
    find_picture_difference,
    join_pictures,
    read_golden,
)


@pytest.mark.parametrize("stage", KINDS)
def test_a_stage_matches_the_golden_file_of_its_version(first_run: dict[str, Any], stage: str) -> None:
    path = Path(first_run["paths"]["manifests"][stage])
    found = describe(stage, KINDS[stage].model_validate(verify_signed(parse_json(path.read_bytes()))))
    golden = read_golden(stage)
    again = "then write the golden files anew: python -m tests.golden"
    assert golden["stage_version"] == found["stage_version"], again
    bump = f"raise STAGE_VERSION in tasks/{stage}/, {again}"
    assert golden["schema_sha256"] == found["schema_sha256"], f"the manifest has another shape: {bump}"
    absolute = GRADE if stage == "scoring" else ABSOLUTE
    difference = find_difference(golden["result"], found["result"], absolute=absolute)
    if not difference and stage in ("prior", "evaluation"):
        difference = find_picture_difference(FOLDER / f"{stage}.png", join_pictures(path.parent))
    assert not difference, f"{difference}: {bump}"


def test_find_difference_reports_the_first_mismatch() -> None:
    golden = {"a": [1.0, "x"], "b": {"c": 1}}
    assert find_difference(golden, {"a": [1.001, "x"], "b": {"c": 1}}) == ""
    assert find_difference(golden, {"a": [1.1, "x"], "b": {"c": 1}}) == "/a/0: 1.0, now 1.1"
    assert find_difference(golden, {"a": [1.0, "y"], "b": {"c": 1}}) == "/a/1: 'x', now 'y'"
    assert find_difference(golden, {"a": [1.0], "b": {"c": 1}}) == "/a: 2 items, now 1"
    assert find_difference(golden, {"a": [1.0, "x"], "b": {}}) == "/b: fields ['c']"

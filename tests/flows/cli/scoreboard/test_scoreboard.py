"""`likeness scoreboard` with real runs and another trainer's LoRA: nothing runs twice, failures are kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from flows.cli.scoreboard.job import choose_parallel
from flows.scoreboard.cells import draw_subjects, find_result, list_cells
from flows.scoreboard.plan import read_plan
from tests.support.cli_sandbox import QUICK, CliSandbox

PLAN = {
    "seeds": [23],
    "drawn": ["mug-3"],
    "settings": [*QUICK, "tracking=none", "publishing=local"],
    "reference": "full",
    "methods": {"full": {"settings": ["training/method=full"]}, "lora": {"settings": ["training/method=lora"]}},
    "directions": [
        {"claim": "less", "method": "lora", "reference": "full", "metrics": ["dino"], "expected": "lower"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> CliSandbox:
    folder = tmp_path_factory.mktemp("scoreboard")
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    return CliSandbox(folder)


def test_a_scoreboard_is_made_once_and_takes_other_trainers_models(own: CliSandbox) -> None:
    first = own.likeness("scoreboard", "plan.yaml", "--format", "json", "--parallel", "2")
    assert first.returncode == 0, first.stderr[-3000:]
    assert "2 models, 0 of them finished before" in first.stderr
    found = json.loads(first.stdout)
    assert [row["method"] for row in found["methods"]] == ["base", "full", "lora"]
    out = own.folder / "scoreboard"
    assert json.loads((out / "scoreboard.json").read_text()) == found
    assert (out / "scoreboard.png").stat().st_size > 1000
    for model in found["models"]:
        summary = json.loads((out / model["run"] / "summary.json").read_text())
        [row] = [row for row in found["methods"] if row["method"] == model["method"]]
        assert row["means"]["dino"]["mean"] == pytest.approx(summary["metrics"]["tuned"]["dino"], abs=1e-6)
        assert model["command"].startswith("likeness run ")

    # The file that diffusers' trainer writes, by the same function, as another trainer's model.
    [lora] = [model for model in found["models"] if model["method"] == "lora"]
    target = own.folder / "models" / "peer" / "mug-3"
    target.mkdir(parents=True)
    [weights] = (out / lora["run"] / "model").glob("pytorch_lora_weights.safetensors")
    shutil.copy(weights, target)
    again = own.likeness("scoreboard", "plan.yaml", "--format", "json", "--external", "models")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "3 models, 2 of them finished before" in again.stderr
    rows = {row["method"]: row for row in json.loads(again.stdout)["methods"]}
    assert rows["peer"]["means"]["dino"]["mean"] == pytest.approx(rows["lora"]["means"]["dino"]["mean"], abs=1e-4)
    assert rows["peer"]["differences"]["clip_t"]["num"] == rows["lora"]["differences"]["clip_t"]["num"]

    # Other photos in the same place, and samples that have left the store, are no finished results.
    [cell, *_] = list_cells(read_plan(own.folder / "plan.yaml"), draw_subjects(["mug-3"], out / "subjects"), out)
    assert find_result(cell, out) is not None
    photo = out / "subjects" / "mug-3" / "mug-3-01.jpg"
    kept = photo.read_bytes()
    photo.write_bytes(kept + b"0")
    assert find_result(cell, out) is None
    photo.write_bytes(kept)
    assert find_result(cell, out) is not None
    (out / "store").rename(out / "away")
    assert find_result(cell, out) is None
    (out / "away").rename(out / "store")

    # Another model in the same place is another result.
    [target] = target.iterdir()
    target.write_bytes(b"damaged")
    third = own.likeness("scoreboard", "plan.yaml", "--external", "models")
    assert third.returncode != 0
    assert target.name in third.stderr


def test_a_failed_model_is_kept_with_its_reason_and_the_others_are_shown(own: CliSandbox) -> None:
    plan = {
        **PLAN,
        "methods": {**PLAN["methods"], "hot": {"settings": ["subject.min_images=9"]}},
    }  # type: ignore[dict-item]
    (own.folder / "hot.yaml").write_text(yaml.safe_dump(plan))
    done = own.likeness("scoreboard", "hot.yaml", "--format", "md")
    assert done.returncode == 1
    assert "failed: hot.mug-3.23: " in done.stdout
    assert "| full |" in done.stdout
    log = own.folder / "scoreboard" / "logs" / "hot.mug-3.23.log"
    assert log.read_text().startswith("likeness run ")


def test_the_commands_can_be_read_before_anything_is_run(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    done = CliSandbox(tmp_path).likeness("scoreboard", "plan.yaml", "--dry-run")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["likeness", "run"]] * 2
    assert not list((tmp_path / "scoreboard").glob("2*"))


def test_the_mini_model_runs_once_per_core_as_memory_allows_and_others_one_at_a_time_on_the_cpu(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    [cell, *_] = list_cells(read_plan(), draw_subjects(["mug-3", "fish-7"], tmp_path), tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 2**30))
    assert choose_parallel(cell) == 3
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7 * 2**30))
    assert choose_parallel(cell) == 2
    model = {"diffusion.pretrained_model_name_or_path": str(tiny_model_folder)}
    other = cell.request.model_copy(update={"llm": "openai", "settings": {**cell.request.settings, **model}})
    assert choose_parallel(replace(cell, request=other)) == 1

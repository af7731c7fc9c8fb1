"""A textual-inversion embedding gets the figures that the run which learned it gives its own."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tasks.diffusion.textual_inversion import EMBEDS_FILE
from tests.support.cli_sandbox import QUICK, ROOT, CliSandbox

DEMO = ROOT / "tasks" / "mini" / "demo_subject"
OPTIONS = ("tracking=none", "publishing=local", "evaluation.prompts=set:quick")
PROMPT_SET = {"name": "living/quick", "version": 1}


def test_an_embedding_is_evaluated_by_the_command_line_as_the_run_that_learned_it(sandbox: CliSandbox) -> None:
    done = sandbox.run("training/method=textual_inversion", "training.learning_rate=0.02", *OPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    own = sandbox.newest()
    learned = load_file(Path(sandbox.folder, own["paths"]["model"]) / EMBEDS_FILE)
    # As another trainer writes it: the vectors under the token's name, without our metadata.
    embedding = sandbox.folder / "embedding.safetensors"
    save_file({"my-fish": next(iter(learned.values()))}, embedding)

    words = ("--photos", str(DEMO), "--class-noun", "fish", "--token", "sks")
    done = sandbox.likeness("evaluate", str(embedding), *QUICK, "evaluation.prompts=set:quick", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    found = sandbox.newest()
    assert found["evaluated"]["kind"] == "textual_inversion"
    for side in ("base", "tuned"):  # the same vectors, prompts and seeds
        assert found["metrics"][side] == pytest.approx(own["metrics"][side], abs=1e-4)
    assert found["metrics"]["tuned"]["dino"] != pytest.approx(found["metrics"]["base"]["dino"], abs=1e-3)
    assert found["prompt_set"] == own["prompt_set"] == PROMPT_SET
    page = (sandbox.output / found["run_id"] / "report.html").read_text()
    assert "A textual-inversion embedding that was trained elsewhere" in page
    assert "Prompts: the set living/quick, version 1" in page

    compared = sandbox.likeness("compare", own["run_id"], found["run_id"], "--format", "md")
    assert compared.returncode == 0, compared.stderr
    assert "training-seed variance is not in the intervals" in compared.stdout
    # What was evaluated is used by name, also where the file has left its place.
    shutil.move(embedding, sandbox.folder / "moved.safetensors")
    image = sandbox.likeness("generate", found["run_id"], "a photo of sks fish", "--steps", "1", "--seed", "3")
    assert image.returncode == 0, image.stderr
    assert "seed 3" in image.stdout

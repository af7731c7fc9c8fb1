"""What mypy has to catch: two manifests that are swapped in the flow."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FLOW = (ROOT / "flows" / "personalize_subject.py").read_text()
SWAPS = [
    ("config.seed, subject, prior)", "config.seed, prior, subject)"),
    ("diffusion, tuned, subject)", "diffusion, subject, tuned)"),
    ("evaluation, subject)", "subject, evaluation)"),
    ("RunManifests(subject, prior, tuned,", "RunManifests(subject, tuned, prior,"),
    ("run.summarize(manifests, publication)", "run.summarize(publication, manifests)"),
]


def check(text: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    path = folder / "swapped_flow.py"
    path.write_text(text)
    words = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(path)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def the_flow_itself_passes(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = check(FLOW, tmp_path_factory.mktemp("flow"))
    assert done.returncode == 0, done.stdout


def test_swapped_manifests_fail_the_type_check(tmp_path: Path) -> None:
    """All swaps are checked at once: each one has to be an error of its own."""
    text = FLOW
    for right, wrong in SWAPS:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    done = check(text, tmp_path)
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    swapped = {number for number, line in enumerate(text.splitlines(), 1) if any(wrong in line for _, wrong in SWAPS)}
    assert swapped <= lines, done.stdout

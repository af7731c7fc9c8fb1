"""Make `.venv` and install what the locks say. Needs nothing but Python's standard library.

    python3 deployments/setup_environment.py [--dev]

Idempotent: a second call with unchanged locks does nothing. Messages are one line each.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST, NEWEST = (3, 11), (3, 13)
NEEDED_BYTES = 4_000_000_000


def main() -> None:
    """Check, create, install."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also install what tests and checks need")
    options = parser.parse_args()
    check_python()
    locks = ["requirements.lock", *(["requirements-dev.lock"] if options.dev else [])]
    stamp = VENV / "locks.sha256"
    wanted = digest_of([*locks, "pyproject.toml"])  # covers where the checkout lies, too
    if stamp.exists() and wanted in stamp.read_text().split():
        return
    check_disk()
    python = create_venv()
    install_torch(python)
    pip(
        python, "install", "--no-deps", "--require-hashes", *(arg for name in locks for arg in ("-r", str(ROOT / name)))
    )
    if sys.platform == "linux" and not is_cpu_torch(python):
        check_disk(8_000_000_000)
        pip(python, "install", "--no-deps", "--require-hashes", "-r", str(ROOT / "requirements-cuda.lock"))
    pip(python, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    runtime_only = digest_of(["requirements.lock", "pyproject.toml"])
    stamp.write_text(f"{wanted}\n{runtime_only}\n")


def check_python() -> None:
    """Stop with one line where this Python can't run the project."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = ".".join(map(str, sys.version_info[:3]))
        stop(f"Python 3.11 to 3.13 is needed, this is {found}; set PYTHON, for example: make demo PYTHON=python3.11")


def check_disk(needed: int = NEEDED_BYTES) -> None:
    """Stop with one line where there is too little disk."""
    free = shutil.disk_usage(ROOT).free
    if free < needed:
        stop(f"{free / 1e9:.1f} GB of disk are free in {ROOT}, {needed / 1e9:.0f} GB are needed")


def create_venv() -> Path:
    """Create the virtual environment if it is missing and return its Python."""
    python = VENV / "bin" / "python"
    if not has_pip(python):
        say(f"creating {VENV}")
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists(), symlinks=True)
        except (OSError, subprocess.CalledProcessError) as error:
            stop(f"cannot create {VENV}: {error}; on Debian: apt install python3-venv")
    return python


def has_pip(python: Path) -> bool:
    """Whether the environment is whole: a set-up that was cut off leaves a Python without pip."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def install_torch(python: Path) -> None:
    """Prefer an offline CPU wheel where pip is configured with a folder of wheels.

    Given hashes, pip ranks index files (whose hash it knows) before local ones, so the local wheel
    is tried first and alone; without one, nothing happens here.
    """
    if is_installed(python, "torch"):
        return
    entry = re.search(r"^torch==(?:.*\\\n)*.*\n", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    if entry is None:
        stop("requirements.lock has no torch; see CONTRIBUTING.md")
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(entry[0])
        file.flush()
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--require-hashes",
            "-r",
            file.name,
        ]
        subprocess.run(command, check=False, capture_output=True)


def is_installed(python: Path, name: str) -> bool:
    """Whether a distribution is in the environment."""
    code = f"import importlib.metadata as m; m.version({name!r})"
    return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0


def is_cpu_torch(python: Path) -> bool:
    """Whether the installed torch is a build without CUDA."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return b"+cpu" in subprocess.run([str(python), "-c", code], capture_output=True, check=True).stdout


def pip(python: Path, *arguments: str) -> None:
    """Run pip quietly; stop with its last line where it fails."""
    say(f"pip {' '.join(Path(a).name if os.sep in a else a for a in arguments)}")
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments[:1], "-q", *arguments[1:]]
    result = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        stop(f"installation failed: {errors[-1] if errors else result.stderr.strip()[-300:]}")


def digest_of(names: list[str]) -> str:
    """Return a digest of some files of the checkout."""
    contents = [str(ROOT).encode(), *((ROOT / name).read_bytes() for name in names)]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def stop(reason: str) -> None:
    """End with one line."""
    raise SystemExit(f"setup: {reason}")


if __name__ == "__main__":
    main()

"""Create `.venv` and install the locked requirements. Needs nothing but Python's standard library.

    python3 deployments/setup_environment.py [--dev]

Installs with uv, from PATH or else from the pinned release in the lock, and with pip where uv is unavailable.
Idempotent: a second call with unchanged locks does nothing. Messages are one line each.
"""

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = Path("deployments")
RUNTIME = str(LOCKS / "requirements.lock")
DEV = str(LOCKS / "requirements-dev.lock")
CUDA = str(LOCKS / "requirements-cuda.lock")
VENV = ROOT / ".venv"
OLDEST, NEWEST = (3, 11), (3, 13)
NEEDED_BYTES = 4_000_000_000
HEARTBEAT_SECONDS = 10.0
# The locks are complete, see refresh_lock.py, and with hashes it does not matter which index serves a file.
HASHED = ("--no-deps", "--require-hashes")
# Settings of pip that change nothing of what is installed here: every entry is pinned and hashed.
IRRELEVANT = {
    "cache-dir", "config-file", "constraint", "default-timeout", "disable-pip-version-check", "no-color", "no-input",
    "no-warn-script-location", "progress-bar", "quiet", "require-virtualenv", "retries", "root-user-action", "timeout",
    "verbose",
}  # fmt: skip


def main() -> None:
    """Check, create, install."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also install what tests and checks need")
    options = parser.parse_args()
    check_python()
    locks = [RUNTIME, *([DEV] if options.dev else [])]
    stamp = VENV / "locks.sha256"
    target = digest_of([*locks, "pyproject.toml"])  # covers where the checkout lies, too
    if stamp.exists() and target in stamp.read_text().split():
        return
    started = time.monotonic()
    check_disk()
    python = create_venv()
    with tempfile.TemporaryDirectory() as folder:
        installer = find_installer(python, Path(folder))
        install_torch(python, Path(folder))
        count = sum(count_entries(name) for name in locks)
        installer = install(installer, f"up to {count} locked packages", *HASHED, *list_files(locks))
        # Only torch's public Linux wheel needs them, and --no-deps has left them out.
        if sys.platform == "linux" and not is_cpu_torch(python):
            check_disk(8_000_000_000)
            title = f"{count_entries(CUDA)} CUDA packages"
            installer = install(installer, title, *HASHED, *list_files([CUDA]))
        # Built with the locked setuptools: an isolated build would download another one.
        install(installer, "likeness itself", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    # Written last, so an interrupted set-up starts again. The second digest serves later calls without --dev.
    stamp.write_text(f"{target}\n{digest_of([RUNTIME, 'pyproject.toml'])}\n")
    say(f"environment ready in {time.monotonic() - started:.0f} s")


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
        with phase(f"creating {VENV}"):
            try:
                # Cleared where it exists: without a working pip it is an interrupted set-up.
                venv.create(VENV, with_pip=True, clear=VENV.exists(), symlinks=True)
            except (OSError, subprocess.CalledProcessError) as error:
                stop(f"cannot create {VENV}: {error}; on Debian: apt install python3-venv")
    return python


def has_pip(python: Path) -> bool:
    """Whether the environment is complete: an interrupted set-up leaves a Python without pip."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Installer:
    """A command that installs requirements into the environment, and what it needs to find the same files as pip."""

    python: Path
    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """Addresses of indexes may hold credentials, which arguments would show to every process."""

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # one pipe: two would need a reader each
            text=True,
            errors="replace",
            env={**os.environ, **self.environment},
        )


def make_pip(python: Path) -> Installer:
    """Return pip as an installer."""
    return Installer(python, "pip", (str(python), "-m", "pip", "--disable-pip-version-check", "install"))


def find_installer(python: Path, folder: Path) -> Installer:
    """Return uv where it is available and supports pip's settings, else pip."""
    pip = make_pip(python)
    translated = translate_settings(read_pip_settings(python))
    if translated is None:
        return pip
    arguments, environment = translated
    uv = shutil.which("uv")
    if uv is None or not is_working(uv):
        entry = find_entry(DEV, "uv")
        if entry is None:
            return pip
        (folder / "uv.txt").write_text(entry)
        # Without retries: where no index answers, pip may still find everything in local folders.
        options = ("-q", "--retries", "0", *HASHED, "--target", str(folder / "uv"), "-r", str(folder / "uv.txt"))
        with phase("downloading uv"):
            subprocess.run([*pip.command, *options], check=False, capture_output=True)
        uv = str(folder / "uv" / "bin" / "uv")
        if not is_working(uv):
            say("uv is unavailable; installing with pip")
            return pip
    command = (uv, "--no-progress", "pip", "install", "--python", str(python), *arguments)
    return Installer(python, "uv", command, environment)


def is_working(uv: str) -> bool:
    """Whether this uv runs and supports the options used here."""
    try:
        done = subprocess.run([uv, "pip", "install", "--help"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and "--index-strategy" in done.stdout and "--default-index" in done.stdout


def read_pip_settings(python: Path) -> dict[str, str]:
    """Return pip's settings for `pip install`, from its files and the environment."""
    done = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    rows = re.findall(r"^(:env:|global|install)\.([\w-]+)=(.*)$", done.stdout, re.MULTILINE)
    # Later entries win: the environment over [install] over [global], as in pip.
    ranks = ("global", "install", ":env:")
    return {name: str(ast.literal_eval(value)) for _, name, value in sorted(rows, key=lambda row: ranks.index(row[0]))}


def translate_settings(settings: dict[str, str]) -> tuple[list[str], dict[str, str]] | None:
    """Return uv's arguments and environment for pip's settings; None where uv has no equivalent of one."""
    # As pip: the best version of all indexes (the hashes say which file is right), and bytecode. Without bytecode every
    # start costs a minute where it can't be written later: PYTHONDONTWRITEBYTECODE, a read-only image.
    arguments, environment = ["--index-strategy", "unsafe-best-match", "--compile-bytecode"], {}
    for name, value in settings.items():
        values = value.split()
        if name == "index-url":
            environment["UV_DEFAULT_INDEX"] = value
        elif name == "extra-index-url":
            environment["UV_INDEX"] = " ".join(values)
        elif name == "find-links":
            arguments += [word for item in values for word in ("--find-links", item)]
        elif name == "trusted-host":
            arguments += [word for item in values for word in ("--allow-insecure-host", item)]
        elif name in ("no-index", "no-cache-dir"):
            arguments += [f"--{name.removesuffix('-dir')}"] if value.lower() in ("1", "true", "yes", "on") else []
        elif name == "cert":
            environment["SSL_CERT_FILE"] = value
        elif name == "proxy":
            environment |= {"HTTPS_PROXY": value, "HTTP_PROXY": value}
        elif name not in IRRELEVANT:
            return None
    return arguments, environment


def install_torch(python: Path, folder: Path) -> None:
    """Prefer an offline CPU wheel where pip is configured with a folder of wheels.

    Given hashes, pip ranks index files (whose hash it knows) before local ones, so the local wheel
    is tried first and alone; without one, nothing happens here. uv refuses that wheel: to it, a hash of
    torch==2.13.0 says nothing of 2.13.0+cpu. Once installed, it satisfies the lock's entry for both.
    """
    if is_installed(python, "torch"):
        return
    entry = find_entry(RUNTIME, "torch")
    if entry is None:
        stop(f"{RUNTIME} has no torch; see CONTRIBUTING.md")
        return
    file = folder / "torch.txt"
    file.write_text(entry)
    command = [*make_pip(python).command, "-q", "--no-index", *HASHED, "-r", str(file)]
    with phase("looking for a local wheel of torch"):
        subprocess.run(command, check=False, capture_output=True)


def find_entry(lock: str, name: str) -> str | None:
    """Return a lock's entry of a distribution, with its hashes."""
    entry = re.search(rf"^{re.escape(name)}==(?:.*\\\n)*.*\n", (ROOT / lock).read_text(), re.MULTILINE)
    return entry[0] if entry else None


def count_entries(lock: str) -> int:
    """Return how many distributions a lock names; some are for other systems."""
    return len(set(re.findall(r"^([\w.-]+)==", (ROOT / lock).read_text(), re.MULTILINE)))


def list_files(locks: list[str]) -> list[str]:
    """Return the arguments that name lock files."""
    return [word for name in locks for word in ("-r", str(ROOT / name))]


def is_installed(python: Path, name: str) -> bool:
    """Whether a distribution is in the environment."""
    code = f"import importlib.metadata as m; m.version({name!r})"
    return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0


def is_cpu_torch(python: Path) -> bool:
    """Whether the installed torch is a build without CUDA."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return b"+cpu" in subprocess.run([str(python), "-c", code], capture_output=True, check=True).stdout


def install(installer: Installer, title: str, *arguments: str) -> Installer:
    """Install, with progress, and return the installer that did it: pip where uv fails. Stop where pip fails, too."""
    counts = {"Collecting": 0, "Downloading": 0}
    lines: list[str] = []

    def describe() -> str:
        return ", ".join(f"{name.lower()} {count}" for name, count in counts.items() if count)

    with phase(f"installing {title} with {installer.name}", describe):
        with installer.start(*arguments) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                word = line.split(maxsplit=1)[0] if line.strip() else ""
                if word in counts:
                    counts[word] += 1
                elif word in ("Resolved", "Prepared", "Installed"):  # uv's own phases
                    say(f"  {line.strip()}")
        code = process.returncode
    if code == 0:
        return installer
    errors = [line for line in lines if line.lower().lstrip(" ×").startswith("error")]
    reason = errors[-1] if errors else " ".join(lines)[-300:].strip()
    if installer.name == "pip":
        stop(f"installation failed: {reason}")
    say(f"uv failed, trying pip: {reason}")
    return install(make_pip(installer.python), title, *arguments)


@contextmanager
def phase(title: str, describe: Callable[[], str] = str) -> Iterator[None]:
    """Print a phase's title, a heartbeat while it runs, and how long it took."""
    say(title)
    started, done = time.monotonic(), threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            state = describe()
            say(f"  {time.monotonic() - started:.0f} s{f', {state}' if state else ''}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    say(f"  done in {time.monotonic() - started:.1f} s")


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

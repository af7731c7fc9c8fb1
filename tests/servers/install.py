"""Get the servers that others wrote, for `make test-llm-servers`: venvs, node packages, a compiled program.

python -m tests.servers.install [NAME ...]

Everything lies under build/servers and is kept. It takes some 15 minutes on two cores and 1.5 GB, most of
it for compiling llama.cpp, whose sources come with the source package of llama-cpp-python.
"""

import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.servers.served import SERVERS

LITELLM = "litellm[proxy]==1.106.2"
AIMOCK = "@copilotkit/aimock@1.43.0"
LOCALBUCKET = "localbucket==1.2.1"
S3RVER = "s3rver@3.7.1"
LLAMA = "llama-cpp-python==0.3.36"
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_C_FLAGS_RELEASE=-O1", "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)  # fmt: skip


def run(*words: str | Path) -> None:
    """Run a command and show it."""
    print(" ".join(map(str, words)), flush=True)
    subprocess.run([str(word) for word in words], check=True)


def install_litellm() -> None:
    """Make an environment of its own: its pins would clash with ours."""
    folder = SERVERS / "litellm"
    if not (folder / "bin" / "litellm").exists():
        venv.create(folder, with_pip=True, clear=True)
        run(folder / "bin" / "pip", "install", "-q", LITELLM)


def install_node_package(name: str, package: str) -> None:
    """Install a node package."""
    if shutil.which("npm") is None:
        print(f"{name} is left out: npm is not there")
    elif not (SERVERS / name / "node_modules").exists():
        run("npm", "install", "--silent", "--prefix", SERVERS / name, package)


def install_localbucket() -> None:
    """Install the module, which has no dependencies."""
    if not (SERVERS / "localbucket").exists():
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", SERVERS / "localbucket", LOCALBUCKET)


def build_llama() -> None:
    """Compile llama.cpp's server."""
    if (SERVERS / "llama-server").exists():
        return
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        print("llama.cpp is left out: it needs cmake and g++")
        return
    work = SERVERS / "llama"
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", work, LLAMA)
    [archive] = work.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(work, filter="data")
    [source] = work.glob("*/vendor/llama.cpp")
    run("cmake", "-S", source, "-B", work / "build", *CMAKE)
    run("cmake", "--build", work / "build", "--target", "llama-server", "-j", "2")
    [program] = (work / "build").glob("**/bin/llama-server")
    shutil.copy(program, SERVERS / "llama-server")
    shutil.rmtree(work)


INSTALLERS: dict[str, Callable[[], None]] = {
    "aimock": partial(install_node_package, "aimock", AIMOCK),
    "s3rver": partial(install_node_package, "s3rver", S3RVER),
    "localbucket": install_localbucket,
    "litellm": install_litellm,
    "llama": build_llama,
}


if __name__ == "__main__":
    SERVERS.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or INSTALLERS:
        INSTALLERS[name]()

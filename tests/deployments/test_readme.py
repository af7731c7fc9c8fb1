"""Commands in the document: those that this machine can run are run, of the others what they name exists."""

import os
import re
import shlex
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from prefect.cli._app import _app

from tests.support.cli_sandbox import CliSandbox, serve_prefect

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deployments/README.md").read_text()


def list_commands() -> list[str]:
    """Return the command lines of the document's blocks and its inline code, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    return [re.split(r"\s+#|\s+&$", line)[0] for line in (*lines, *inline)]


PREFECT = sorted(
    {found[1] for line in list_commands() if (found := re.search(r"(?:^|/|=\S+ )prefect ((?:--|[a-z]).*)", line))}
)


@pytest.mark.parametrize("command", PREFECT)
def test_prefect_accepts_a_command_of_the_document(command: str) -> None:
    command = command.replace("SCHEDULE_ID", str(uuid.uuid4()))
    words = [word for word in shlex.split(command) if word != "--no-prompt"]  # an option of all commands
    _app.parse_args(words, exit_on_error=False, print_error=False)


RUN = (
    "prefect work-pool create ", "prefect --no-prompt deploy --all ", "prefect deployment run ", "sed s/",
    "python deployments/make_secrets.py",
)  # fmt: skip
"""How lines begin that run below, each as it is written."""
ELSEWHERE = {
    "likeness ": "tests/architecture/test_commands.py",  # composed; run by tests/stack
    "prefect server start": "tests/support/cli_sandbox.py",
    "prefect worker start ": "tests/stack/test_sweep_pool.py",
    "python -m deployments.register ": "tests/deployments/test_pools.py",
    "PREFECT_API_URL=": "tests/deployments/test_pools.py",
    "python -m torch.distributed.run ": "tests/tasks/training/process/test_ranks.py",
    "python deployments/images/pin_digests.py": "tests/deployments/test_image.py",
}
"""How lines begin that run in another test."""
BEYOND = ("docker ", "kubectl ", "aws ", "source ", "export ", "python -m venv ", "worker/bin/prefect ")
"""How lines begin that need a container builder, a cluster, an account or a registry, or set a variable."""


def test_every_command_is_run_or_known_to_need_what_is_not_here() -> None:
    lines = [line for line in list_blocks() if line and not line.startswith("#")]
    known = (*RUN, *ELSEWHERE, *BEYOND)
    assert [line for line in lines if not line.startswith(known)] == []
    assert [prefix for prefix in known if not any(line.startswith(prefix) for line in lines)] == []
    assert all((ROOT / path).is_file() for path in ELSEWHERE.values())


def list_blocks() -> list[str]:
    """Return the command lines of the document's blocks alone."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.split(r"\s+#|\s+&$", line)[0].strip() for line in lines]


@pytest.mark.timeout(900)  # a dozen commands of Prefect's, of seconds each
def test_the_commands_run_as_they_are_written(tmp_path: Path) -> None:
    """In the document's order, on one server; files are written to a copy of the folder."""
    for name in ("deployments", "conf", "flows", "tasks"):
        (tmp_path / name).mkdir()
        for path in (ROOT / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    (tmp_path / "deployments/make_secrets.py").unlink()
    (tmp_path / "deployments/make_secrets.py").write_bytes((ROOT / "deployments/make_secrets.py").read_bytes())
    (tmp_path / "prefect").mkdir()
    with serve_prefect(tmp_path / "prefect") as url:
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = CliSandbox(tmp_path, url).environment() | {"LIKENESS_HOME": str(ROOT), "PATH": tools}
        pools = 0
        for line in (line for line in list_blocks() if line.startswith(RUN)):
            command = line.replace(" --watch", "")  # no worker: the run stays scheduled
            if command.startswith("prefect work-pool create "):  # the document's alternatives, side by side
                command = command.replace("create likeness", f"create likeness-{pools}") if pools else command
                pools += 1
            if '"store": "shared"' in command:  # on a stack whose own service has registered the operator's options
                command = f"python -m deployments.register process && {command}"
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    secret = tmp_path / "deployments/compose.env"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and "POSTGRES_PASSWORD=" in secret.read_text()
    assert "my-bucket" in (tmp_path / "worker.json").read_text()


def test_the_parser_of_prefect_refuses_an_option_that_does_not_exist() -> None:
    with pytest.raises(Exception, match="Unknown option"):
        _app.parse_args(["work-pool", "create", "x", "--kind", "docker"], exit_on_error=False, print_error=False)
    assert len(PREFECT) > 8


def test_every_file_in_a_command_exists() -> None:
    made = {"deployments/images/digests.env", "deployments/compose.env"}
    named = {word for line in list_commands() for word in re.findall(r"\bdeployments/[\w./-]+", line)} - made
    assert "deployments/images/Dockerfile" in named and "deployments/pools/kubernetes.json" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    modules = {name for line in list_commands() for name in re.findall(r"-m (deployments[\w.]+)", line)}
    assert modules and all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in modules)


def test_every_anchor_leads_to_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= anchors

"""Setting up the environment: with uv as pip would, with pip where uv fails, once."""

import importlib.util
import sys
from pathlib import Path

import diffusers
import pytest

from deployments import setup_environment as setup


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in a folder with a space and an accent, whose locks name one package each."""
    root = tmp_path / "a plàce"
    (root / "deployments").mkdir(parents=True)
    for lock in (setup.RUNTIME, setup.DEV, setup.CUDA):
        (root / lock).write_text("torch==2.13.0 \\\n    --hash=sha256:00\nother==1.0 \\\n    --hash=sha256:11\n")
    (root / "pyproject.toml").write_text("")
    monkeypatch.setattr(setup, "ROOT", root)
    monkeypatch.setattr(setup, "VENV", root / ".venv")
    return root


def make_installer(name: str, code: str) -> setup.Installer:
    return setup.Installer(Path(sys.executable), name, (sys.executable, "-c", code))


def test_pip_index_and_find_links_settings_are_translated_for_uv() -> None:
    settings = {
        "index-url": "https://me:secret@index/simple",
        "extra-index-url": "file:///a/simple file:///b/simple",
        "find-links": "/wheels",
        "cert": "/ca.pem",
        "default-timeout": "180",
    }
    translated = setup.translate_settings(settings)
    assert translated is not None
    arguments, environment = translated
    assert arguments == ["--index-strategy", "unsafe-best-match", "--compile-bytecode", "--find-links", "/wheels"]
    assert environment["UV_DEFAULT_INDEX"] == "https://me:secret@index/simple"
    assert environment["UV_INDEX"] == "file:///a/simple file:///b/simple"
    assert environment["SSL_CERT_FILE"] == "/ca.pem"


def test_installed_packages_have_bytecode() -> None:
    """Without it every process compiles what it imports, where PYTHONDONTWRITEBYTECODE or a read-only image is set."""
    sources = list(Path(str(diffusers.__file__)).parent.rglob("*.py"))
    missing = [str(path) for path in sources if not Path(importlib.util.cache_from_source(str(path))).exists()]
    assert missing == []


def test_a_pip_setting_without_a_uv_equivalent_falls_back_to_pip() -> None:
    assert setup.translate_settings({"client-cert": "/me.pem"}) is None


def test_environment_variables_override_pip_config_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://it's.mine/simple")
    assert setup.read_pip_settings(Path(sys.executable))["index-url"] == "https://it's.mine/simple"


def test_an_unavailable_uv_falls_back_to_pip(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / setup.DEV).write_text("uv==0.0.0 \\\n    --hash=sha256:00\n")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(checkout))
    assert setup.find_installer(Path(sys.executable), checkout).name == "pip"
    assert "uv is unavailable; installing with pip" in capsys.readouterr().err


def test_uv_on_path_is_used(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    uv = checkout / "uv"
    uv.write_text("#!/bin/sh\necho --index-strategy --default-index\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{checkout}:/usr/bin:/bin")
    installer = setup.find_installer(Path(sys.executable), checkout)
    assert (installer.name, installer.command[0]) == ("uv", str(uv))


def test_a_uv_failure_falls_back_to_pip_and_a_failure_of_both_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uv = make_installer("uv", "import sys; print('error: no such file'); sys.exit(2)")
    pip = make_installer("pip", "print('Collecting one')")
    monkeypatch.setattr(setup, "make_pip", lambda python: pip)
    assert setup.install(uv, "2 packages") is pip
    assert "uv failed, trying pip: error: no such file\n" in capsys.readouterr().err
    bad = make_installer("pip", "import sys; print('ERROR: no matching distribution'); print('x'); sys.exit(1)")
    monkeypatch.setattr(setup, "make_pip", lambda python: bad)
    with pytest.raises(SystemExit) as stopped:
        setup.install(uv, "2 packages")
    assert str(stopped.value) == "setup: installation failed: ERROR: no matching distribution"


def test_a_long_install_prints_package_counts_and_elapsed_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "HEARTBEAT_SECONDS", 0.1)
    code = "import time; print('Collecting one', flush=True); print('Collecting two', flush=True); time.sleep(0.5)"
    setup.install(make_installer("pip", code), "2 packages")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "installing 2 packages with pip"
    assert "  0 s, collecting 2" in lines
    assert lines[-1].startswith("  done in 0.")


def test_torch_is_installed_from_local_wheels_with_the_lock_hash(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = checkout / "seen.txt"
    code = f"import sys; open({str(seen)!r}, 'w').write('\\n'.join(sys.argv[1:]) + open(sys.argv[-1]).read())"
    monkeypatch.setattr(setup, "make_pip", lambda python: make_installer("pip", code))
    monkeypatch.setattr(setup, "is_installed", lambda python, name: False)
    setup.install_torch(Path(sys.executable), checkout)
    text = seen.read_text()
    assert {"--no-index", "--no-deps", "--require-hashes"} <= set(text.splitlines())
    assert text.endswith("torch==2.13.0 \\\n    --hash=sha256:00\n")


def test_unchanged_locks_are_not_installed_again(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def create() -> Path:
        made.append("venv")
        setup.VENV.mkdir(exist_ok=True)
        return Path(sys.executable)

    installer = make_installer("pip", "")
    monkeypatch.setattr(sys, "argv", ["setup_environment.py"])
    monkeypatch.setattr(setup, "create_venv", create)
    monkeypatch.setattr(setup, "check_disk", lambda needed=0: None)
    monkeypatch.setattr(setup, "find_installer", lambda python, folder: installer)
    monkeypatch.setattr(setup, "install_torch", lambda python, folder: None)
    monkeypatch.setattr(setup, "is_cpu_torch", lambda python: True)
    setup.main()
    setup.main()
    assert made == ["venv"]
    (checkout / setup.RUNTIME).write_text("other==2.0 \\\n    --hash=sha256:22\n")
    setup.main()
    assert made == ["venv", "venv"]


def test_the_lock_pins_uv_with_hashes() -> None:
    entry = setup.find_entry(setup.DEV, "uv")
    assert entry is not None
    assert "--hash=sha256:" in entry

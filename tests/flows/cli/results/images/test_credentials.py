"""Content credentials: read back by C2PA's own reader, and refused before anything is computed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flows.cli.results.images.credentials import load_credentials, read_manifest
from flows.cli.results.images.files import Target, read_generated
from tasks.errors import ConfigError
from tasks.images import SOURCE_TYPE, encode_png
from tests.support.certificates import KEYS, PEM, certify, write_pair
from tests.support.tiny import draw_photo


@pytest.mark.parametrize("algorithm", KEYS)
def test_images_carry_signed_credentials_beside_their_text(tmp_path: Path, algorithm: str) -> None:
    credentials = load_credentials(*write_pair(tmp_path, algorithm))
    target = Target(tmp_path, credentials=credentials)
    path = target.write(tmp_path / "image.png", draw_photo(0), facts={"Title": "a fish"})
    assert (read_generated(path) or {})["Title"] == "a fish"
    store = read_manifest(path.read_bytes())
    assert store["validation_state"] == "Valid"
    manifest = store["manifests"][store["active_manifest"]]
    assert manifest["signature_info"]["alg"] == algorithm
    assert manifest["claim_generator_info"][0]["name"] == "likeness"
    [actions] = [each for each in manifest["assertions"] if each["label"].startswith("c2pa.actions")]
    assert actions["data"]["actions"][0]["digitalSourceType"] == SOURCE_TYPE
    # A changed pixel breaks the signature; the same name is taken again by the same image.
    changed = bytearray(path.read_bytes())
    changed[changed.index(b"IDAT") + 8] ^= 1
    assert read_manifest(bytes(changed))["validation_state"] == "Invalid"
    assert target.write(tmp_path / "image.png", draw_photo(0), facts={"Title": "a fish"}) == path


def test_keys_in_other_formats_are_taken_and_never_shown(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path)
    private: Any = serialization.load_pem_private_key(key.read_bytes(), password=None)
    sec1 = private.private_bytes(PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    for content in (sec1, sec1 + chain.read_bytes()):
        key.write_bytes(content)
        credentials = load_credentials(chain, key)
        assert credentials is not None
        signed = credentials.sign(encode_png(draw_photo(0)), title="a\udcffb.png")
        store = read_manifest(signed)
        assert store["manifests"][store["active_manifest"]]["title"] == "ab.png"
        assert "PRIVATE" not in repr(Target(tmp_path, credentials=credentials))


def test_without_a_certificate_images_are_not_signed(tmp_path: Path) -> None:
    assert load_credentials(None, None) is None
    path = Target(tmp_path).write(tmp_path / "image.png", draw_photo(0), facts={})
    with pytest.raises(Exception, match="ManifestNotFound"):
        read_manifest(path.read_bytes())


def test_bad_credentials_are_one_line_that_names_the_option(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path / "good")
    old, old_key = write_pair(tmp_path / "old", days=-1)
    _, locked = write_pair(tmp_path / "locked", password=b"secret")
    large, text = tmp_path / "large.pem", tmp_path / "text.pem"
    large.write_bytes(b"x" * 200_000)
    text.write_text("hello")
    curve = ec.generate_private_key(ec.SECP256K1())
    (tmp_path / "curve.pem").write_bytes(certify("a", curve, "b", KEYS["Es256"](), is_ca=False).public_bytes(PEM))
    (tmp_path / "curve-key.pem").write_bytes(
        curve.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    cases = [
        (chain, None, "--c2pa-key is missing"),
        (None, key, "--c2pa-certificate is missing"),
        (tmp_path / "none.pem", key, r"--c2pa-certificate: .*none.pem cannot be read"),
        (large, key, "--c2pa-certificate: .*larger than 100,000 bytes"),
        (text, key, "--c2pa-certificate: .*holds no certificate as PEM"),
        (chain, text, "--c2pa-key: .*holds no private key as PEM"),
        (chain, locked, "--c2pa-key: .*is encrypted"),
        (chain, old_key, "--c2pa-key: .*is not the key of the first certificate"),
        (old, old_key, "--c2pa-certificate: signing failed: .*not valid at time of signing"),
        (tmp_path / "curve.pem", tmp_path / "curve-key.pem", "--c2pa-certificate: C2PA takes keys on P-256"),
    ]
    for certificate, private, reason in cases:
        with pytest.raises(ConfigError, match=reason) as caught:
            load_credentials(certificate, private)
        assert "\n" not in str(caught.value)


def test_a_missing_package_and_a_missing_file_end_before_a_model_is_loaded(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path)
    (tmp_path / "c2pa.py").write_text("raise ImportError")
    command = [sys.executable, "-m", "flows.cli.main", "generate", "no run", "a fish"]
    environment = {**os.environ, "LIKENESS_C2PA_CERTIFICATE": str(chain), "LIKENESS_C2PA_KEY": str(key)}
    done = subprocess.run(
        command,
        check=False,
        env={**environment, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True,
        text=True,
    )
    assert "--c2pa-certificate needs the package: pip install 'c2pa-python>=0.38'" in done.stderr
    done = subprocess.run(
        command, check=False, env={**environment, "LIKENESS_C2PA_KEY": "none"}, capture_output=True, text=True
    )
    assert "--c2pa-key: none cannot be read" in done.stderr
    assert done.stderr.count("\n") == 1

"""Content credentials (C2PA): generated images are signed by who publishes them. Needs c2pa-python, an extra."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import ConfigError, first_line
from tasks.images import SOURCE_TYPE, encode_png
from tasks.publishing.versions import list_versions
from tasks.redaction import clean_text

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

CERTIFICATE, KEY = "--c2pa-certificate", "--c2pa-key"
INSTALL = "pip install 'c2pa-python>=0.38'"
SUPPORTED = "C2PA takes keys on P-256, P-384, P-521, Ed25519 and RSA"
FORMAT = "image/png"
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
"""C2PA's name of the signature algorithm, by the curve of the key."""
MAX_BYTES = 100_000
"""Of a file with certificates or a key."""


@dataclass(frozen=True)
class ContentCredentials:
    """A certificate chain and its private key, both as PEM; neither is shown."""

    algorithm: str
    chain: bytes = field(repr=False)
    key: bytes = field(repr=False)

    def sign(self, png: bytes, *, title: str) -> bytes:
        """Return the PNG with a signed manifest that says it was made by a trained model.

        Raises:
            ConfigError: the certificate, or the signature as read back, is not valid.

        """
        import c2pa

        software = {"name": "likeness", "version": list_versions().get("likeness", "checkout")}
        action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": software}
        manifest = {
            "claim_generator_info": [software],
            "title": clean_text(title, keep=""),
            "format": FORMAT,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        try:
            # A thumbnail would be larger than a small picture.
            with (
                c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}}) as context,
                c2pa.Signer.from_info(
                    c2pa.C2paSignerInfo(self.algorithm.encode(), self.chain, self.key, None)
                ) as signer,
                c2pa.Builder(manifest, context=context) as builder,
            ):
                builder.sign(signer, FORMAT, io.BytesIO(png), signed)
            check_manifest(read_manifest(signed.getvalue()))
        except c2pa.C2paError as error:
            raise ConfigError(f"{CERTIFICATE}: signing failed: {first_line(error)}") from error
        return signed.getvalue()


def read_manifest(png: bytes) -> dict[str, Any]:
    """Return the manifest store of a signed PNG with the results of its validation."""
    import c2pa

    with c2pa.Reader(FORMAT, io.BytesIO(png)) as reader:
        found: dict[str, Any] = json.loads(reader.json())
    return found


def check_manifest(store: dict[str, Any]) -> None:
    """Raise ConfigError for a signature that is not valid; whether the signer is trusted, each reader decides."""
    if store.get("validation_state") in ("Valid", "Trusted"):
        return
    failures = store.get("validation_results", {}).get("activeManifest", {}).get("failure", [])
    reasons = [f"{each['code']} ({each['explanation']})" for each in failures if "untrusted" not in each["code"]]
    raise ConfigError(f"{CERTIFICATE}: the signature is not valid: {', '.join(reasons) or 'no reason given'}")


def load_credentials(certificate: Path | None, key: Path | None) -> ContentCredentials | None:
    """Return the credentials of two PEM files, tried on a small picture; None without them.

    Raises:
        ConfigError: one of the two or the package is missing, a file is no PEM, or they don't belong together.

    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError(f"{CERTIFICATE} and {KEY} belong together; {KEY if key is None else CERTIFICATE} is missing")
    try:
        import c2pa  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ConfigError(f"{CERTIFICATE} needs the package: {INSTALL}") from error
    chain = read_file(certificate, CERTIFICATE)
    leaf, private = load_leaf(chain, certificate), load_key(key)
    if private.public_key() != leaf.public_key():
        raise ConfigError(f"{KEY}: {key} is not the key of the first certificate in {certificate}")
    credentials = ContentCredentials(find_algorithm(leaf), chain, dump_key(private))
    # Before anything is computed: an expired certificate, or one that may not sign, is found here.
    credentials.sign(encode_png(make_probe(), is_generated=True), title="probe")
    return credentials


def load_leaf(chain: bytes, path: Path) -> "Certificate":
    """Return the first certificate. Raises ConfigError."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        leaf.public_key()
    except ValueError as error:
        raise ConfigError(f"{CERTIFICATE}: {path} holds no certificate as PEM") from error
    except UnsupportedAlgorithm as error:
        raise ConfigError(f"{CERTIFICATE}: {SUPPORTED}") from error
    return leaf


def load_key(path: Path) -> Any:
    """Return the private key, in any of PEM's formats. Raises ConfigError, without the file's text."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    secret = read_file(path, KEY)
    try:
        return load_pem_private_key(secret, password=None)
    except TypeError as error:
        raise ConfigError(f"{KEY}: {path} is encrypted; decrypt it into a file that you alone can read") from error
    except ValueError as error:
        raise ConfigError(f"{KEY}: {path} holds no private key as PEM") from error
    except UnsupportedAlgorithm as error:
        raise ConfigError(f"{KEY}: {SUPPORTED}") from error


def dump_key(private: Any) -> bytes:
    """Return a key as a single block of PKCS#8, the one format that c2pa takes."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    data: bytes = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return data


def read_file(path: Path, option: str) -> bytes:
    """Return a small file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {path} cannot be read: {first_line(error)}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{option}: {path} is larger than {MAX_BYTES:,} bytes")
    return data


def find_algorithm(leaf: "Certificate") -> str:
    """Return C2PA's name of the signature algorithm of a certificate's key. Raises ConfigError."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match leaf.public_key():
        case ec.EllipticCurvePublicKey(curve=curve) if curve.name in CURVES:
            return CURVES[curve.name]
        case ed25519.Ed25519PublicKey():
            return "ed25519"
        case rsa.RSAPublicKey():
            return "ps256"
    raise ConfigError(f"{CERTIFICATE}: {SUPPORTED}")


def make_probe() -> Any:
    """Return a small picture."""
    from PIL import Image

    return Image.new("RGB", (16, 16))

"""Certificates and keys that may sign content credentials."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM
DAY = datetime.timedelta(1)
KEYS: dict[str, Callable[[], Any]] = {
    "Es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "Ps256": lambda: rsa.generate_private_key(65537, 2048),
}


def certify(subject: str, key: Any, issuer: str, issuer_key: Any, *, is_ca: bool, days: int = 30) -> x509.Certificate:
    """Return a certificate that ends `days` from now; a leaf may sign, as C2PA demands."""

    def name(common: str) -> x509.Name:
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Studio"), x509.NameAttribute(NameOID.COMMON_NAME, common)]
        )

    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=is_ca, crl_sign=is_ca, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 100 * DAY)
        .not_valid_after(now + days * DAY)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_ca:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purposes, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def write_pair(folder: Path, algorithm: str = "Es256", *, days: int = 30, password: bytes | None = None) -> list[Path]:
    """Write a certificate chain and its key; return both paths."""
    authority, key = KEYS["Es256"](), KEYS[algorithm]()
    chain = [
        certify("signer", key, "authority", authority, is_ca=False, days=days),
        certify("authority", authority, "authority", authority, is_ca=True),
    ]
    folder.mkdir(exist_ok=True)
    (folder / "chain.pem").write_bytes(b"".join(each.public_bytes(PEM) for each in chain))
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption))
    return [folder / "chain.pem", folder / "key.pem"]

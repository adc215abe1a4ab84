"""A certificate authority for the nodes of one deployment, and the certificates that it issues.

ECDSA on P-256, as PEM files. An authority is a directory with `ca.crt` and `ca.key`; a node gets one with `ca.crt`,
`tls.crt` and `tls.key` (config.node_tls). Keys may be read by their owner alone.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stator.config.node_tls import CA_NAME, CERT_NAME, KEY_NAME, check_private
from stator.errors import ConfigError

CA_KEY_NAME = "ca.key"
AUTHORITY_DAYS = 3650
NODE_DAYS = 365
MAX_DAYS = 3650
BACKDATED = timedelta(minutes=5)
"""Clocks of two hosts differ."""

_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_HOST = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")


def make_authority(directory: Path, *, now: datetime | None = None, days: int = AUTHORITY_DAYS) -> Path:
    """Write a new authority's files. Returns its certificate's path.

    Raises ConfigError if there is one already: every certificate that it issued would be worth nothing."""
    existing = [name for name in (CA_NAME, CA_KEY_NAME) if (directory / name).exists()]
    if existing:
        raise ConfigError(
            f"{directory} has an authority already ({', '.join(existing)}); a new one would make all its certificates "
            f"worthless. Name another directory, or move that one away"
        )
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    # Two authorities are told apart by name in messages of other tools.
    name = _name(f"Stator authority {x509.random_serial_number() & 0xFFFFFFFF:08x}")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(directory / CA_KEY_NAME, _pem_of_key(key), private=True)
    _write(directory / CA_NAME, certificate.public_bytes(serialization.Encoding.PEM))
    return directory / CA_NAME


def issue(
    authority: Path,
    hosts: Sequence[str],
    out: Path,
    *,
    days: int = NODE_DAYS,
    replace: bool = False,
    now: datetime | None = None,
) -> Path:
    """Write a node's three files to out, for names and addresses that others reach it at. Returns the certificate's
    path. A running node takes the new ones for its next connections.

    Raises ConfigError for an authority or hosts that cannot be used, and for files that are there unless replace."""
    ca, ca_key = _read_authority(authority)
    names = [_general_name(host) for host in dict.fromkeys(hosts)]
    if not names:
        raise ConfigError("a certificate needs a --host: every name and address that other nodes reach this one at")
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"--days {days}: expected 1 to {MAX_DAYS}")
    there = [name for name in (CERT_NAME, KEY_NAME) if (out / name).exists()]
    if there and not replace:
        raise ConfigError(f"{out} has {' and '.join(there)} already; --force replaces them, or give another --out")
    now = now or datetime.now(UTC)
    if ca.not_valid_after_utc <= now:
        raise ConfigError(f"the authority {authority / CA_NAME} ended on {ca.not_valid_after_utc:%Y-%m-%d}")
    key = ec.generate_private_key(ec.SECP256R1())
    end_days = min(days, (ca.not_valid_after_utc - now).days)
    both_ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(_name(hosts[0][:64]), ca.subject, key.public_key(), now, end_days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_ends), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write(out / KEY_NAME, _pem_of_key(key), private=True)
    _write(out / CERT_NAME, certificate.public_bytes(serialization.Encoding.PEM))
    _write(out / CA_NAME, ca.public_bytes(serialization.Encoding.PEM))
    return out / CERT_NAME


def _read_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    cert_file, key_file = directory / CA_NAME, directory / CA_KEY_NAME
    missing = [file.name for file in (cert_file, key_file) if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{directory} is no authority: it lacks {' and '.join(missing)}; `stator certs init` makes one"
        )
    check_private(key_file)
    try:
        certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the authority in {directory} cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{key_file} is not the key of {cert_file}")
    return certificate, key


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise ConfigError(f"--host {host}: expected a host's name, or an address such as 10.0.0.5, without a port")
    return x509.DNSName(host)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(file: Path, data: bytes, *, private: bool = False) -> None:
    """Whole or not at all, for a node that reads its files again when they change."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o644)
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
        draft.replace(file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None

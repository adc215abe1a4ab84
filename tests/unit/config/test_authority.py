"""Certificates of nodes, checked by OpenSSL through Python's ssl."""

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from stator.config.authority import MAX_DAYS, issue, make_authority
from stator.config.node_tls import CA, CERT, DIR, KEY, VERIFY, NodeTls, TlsVerify, node_tls
from stator.errors import ConfigError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def test_a_certificate_names_its_hosts_and_can_be_used_at_both_ends(tmp_path: Path) -> None:
    make_authority(tmp_path / "ca")
    issued = certificate(issue(tmp_path / "ca", ["node-1", "10.0.0.5", "fe80::1", "node-1"], tmp_path / "node"))
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-1"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.5", "fe80::1"]
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.load_verify_locations(tmp_path / "node" / "ca.crt")
        context.load_cert_chain(tmp_path / "node" / "tls.crt", tmp_path / "node" / "tls.key")
    for key in (tmp_path / "ca" / "ca.key", tmp_path / "node" / "tls.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not (tmp_path / "node" / "ca.key").exists()


def test_how_long_they_are_valid(tmp_path: Path) -> None:
    ca = certificate(make_authority(tmp_path / "ca", now=NOW, days=100))
    assert ca.not_valid_before_utc < NOW and ca.not_valid_after_utc == NOW + timedelta(days=100)
    node = certificate(issue(tmp_path / "ca", ["a"], tmp_path / "a", days=30, now=NOW))
    assert node.not_valid_after_utc == NOW + timedelta(days=30)
    longer = certificate(issue(tmp_path / "ca", ["b"], tmp_path / "b", days=300, now=NOW + timedelta(days=1)))
    assert longer.not_valid_after_utc <= ca.not_valid_after_utc, "no longer than its authority"
    with pytest.raises(ConfigError, match=r"ended on 2030-04-11"):
        issue(tmp_path / "ca", ["c"], tmp_path / "c", now=NOW + timedelta(days=101))


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    make_authority(tmp_path / "ca")
    with pytest.raises(ConfigError, match=r"has an authority already \(ca.crt, ca.key\)"):
        make_authority(tmp_path / "ca")
    first = issue(tmp_path / "ca", ["a"], tmp_path / "a").read_bytes()
    with pytest.raises(ConfigError, match=r"has tls.crt and tls.key already; --force"):
        issue(tmp_path / "ca", ["a"], tmp_path / "a")
    assert issue(tmp_path / "ca", ["a"], tmp_path / "a", replace=True).read_bytes() != first


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no authority: it lacks ca.crt and ca.key; `stator certs init`"):
        issue(tmp_path, ["a"], tmp_path / "a")
    make_authority(tmp_path / "ca")
    for host in ("a:8000", "http://a", "-a", "a..b", "", "a b", "x" * 300):
        with pytest.raises(ConfigError, match="--host"):
            issue(tmp_path / "ca", [host], tmp_path / "a")
    with pytest.raises(ConfigError, match="needs a --host"):
        issue(tmp_path / "ca", [], tmp_path / "a")
    with pytest.raises(ConfigError, match=f"expected 1 to {MAX_DAYS}"):
        issue(tmp_path / "ca", ["a"], tmp_path / "a", days=0)
    make_authority(tmp_path / "other")
    (tmp_path / "ca" / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"is not the key of"):
        issue(tmp_path / "ca", ["a"], tmp_path / "a")
    (tmp_path / "ca" / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by others; run: chmod 600"):
        issue(tmp_path / "ca", ["a"], tmp_path / "a")


# What a node reads.


@pytest.fixture
def node(tmp_path: Path) -> Path:
    make_authority(tmp_path / "ca")
    issue(tmp_path / "ca", ["a"], tmp_path / "a")
    return tmp_path / "a"


def test_a_directory_or_files_one_by_one(node: Path) -> None:
    files = tuple(str(node / name) for name in ("ca.crt", "tls.crt", "tls.key"))
    assert node_tls({}) is None
    assert node_tls({DIR: str(node)}) == NodeTls(*files)
    assert node_tls(dict(zip((CA, CERT, KEY), files, strict=True)) | {VERIFY: "ca"}) == NodeTls(*files, TlsVerify.CA)
    other_ca = node.parent / "ca" / "ca.crt"
    assert node_tls({DIR: str(node), CA: str(other_ca)}) == NodeTls(str(other_ca), *files[1:])


def test_mistakes_are_named(node: Path) -> None:
    with pytest.raises(ConfigError, match=r"STATOR_TLS_CERT and STATOR_TLS_KEY not set"):
        node_tls({CA: str(node / "ca.crt")})
    with pytest.raises(ConfigError, match=r"STATOR_TLS_CA: there is no file .*/nowhere/ca.crt"):
        node_tls({DIR: str(node / "nowhere")})
    with pytest.raises(ConfigError, match=r"STATOR_TLS_VERIFY is 'none': expected full or ca"):
        node_tls({DIR: str(node), VERIFY: "none"})
    (node / "tls.key").chmod(0o640)
    with pytest.raises(ConfigError, match="may be read by others"):
        node_tls({DIR: str(node)})

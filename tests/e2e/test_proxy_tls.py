"""An upstream behind TLS is verified, unless somebody says otherwise."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mcp_pg_events.errors import ConfigurationError
from mcp_pg_events.proxy.check import examine
from tests.support.scripted_upstream import ScriptedUpstream

pytestmark = pytest.mark.anyio


def certified(directory: Path) -> Path:
    """A self-signed certificate of 127.0.0.1, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    file = directory / "certificate.pem"
    file.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return file


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return certified(tmp_path)


@pytest.fixture
async def upstream(certificate: Path) -> AsyncIterator[ScriptedUpstream]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with ScriptedUpstream.running(context) as running:
        yield running


async def test_a_certificate_that_nobody_vouches_for_is_refused_in_one_sentence(upstream: ScriptedUpstream) -> None:
    [check] = await examine(upstream.url)
    assert (check.name, check.status, check.found) == (
        "upstream",
        "fail",
        "The upstream's certificate cannot be verified",
    )


async def test_it_is_taken_where_its_authority_is_named(upstream: ScriptedUpstream, certificate: Path) -> None:
    assert {check.status for check in await examine(upstream.url, ca_file=str(certificate))} == {"ok"}


async def test_it_is_taken_where_nothing_is_verified(upstream: ScriptedUpstream) -> None:
    assert {check.status for check in await examine(upstream.url, verify=False)} == {"ok"}


async def test_another_hosts_certificate_is_refused(upstream: ScriptedUpstream, certificate: Path) -> None:
    [check] = await examine(upstream.url.replace("127.0.0.1", "localhost"), ca_file=str(certificate))
    assert check.found == "The upstream's certificate cannot be verified"


async def test_a_server_without_tls_is_no_upstream_behind_it() -> None:
    async with ScriptedUpstream.running() as plain:
        [check] = await examine(plain.url.replace("http:", "https:"))
    assert check.status == "fail"
    assert "\n" not in check.found and "_ssl.c" not in check.found


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n"])
async def test_a_file_without_certificates_is_a_wrong_option(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "authorities.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"The file of certificates '.*authorities\.pem' cannot be used"):
        await examine("https://127.0.0.1:1/mcp", ca_file=str(file))

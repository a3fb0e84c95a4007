"""Certificates and keys of a federation, in files that their owner alone can read: by `cryptography`.

ca.pem, server.pem, server.key    of the SuperLink: a certificate that ca.pem has signed
NAME.key, NAME.pub                of each client's node: a pair on the curve P-384

The key that has signed is kept nowhere, so nothing else can come to bear a certificate of this authority.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAYS = 365
HERE = ("localhost", "127.0.0.1", "::1")


def write_certificates(folder: str | Path, hosts: Sequence[str] = HERE) -> None:
    """Into a folder that is made where there is none.  hosts: the names and addresses by which nodes reach the
    SuperLink."""
    folder = private(folder)
    authority, own = new_key(), new_key()
    issuer = _named("undula federation")
    write_secret(folder / "ca.pem", _certificate(issuer, authority, issuer, authority, ()))
    write_secret(folder / "server.pem", _certificate(_named(hosts[0]), own, issuer, authority, hosts))
    write_secret(
        folder / "server.key",
        own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def write_pair(folder: str | Path, name: str) -> None:
    """The pair of a node, as OpenSSH writes them."""
    folder = private(folder)
    key, form = new_key(), serialization.Encoding
    secret = key.private_bytes(form.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    write_secret(folder / f"{name}.key", secret)
    public = key.public_key().public_bytes(form.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_secret(folder / f"{name}.pub", public + b"\n")


def public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The key in a .pub file.  Raises ValueError for one that is on no curve."""
    key = serialization.load_ssh_public_key(path.read_bytes())
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"{path} is no public key on an elliptic curve: ssh-keygen -t ecdsa -b 384")
    return key


def private(folder: str | Path) -> Path:
    """The folder, made where there is none: its owner's alone."""
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(folder)


def new_key() -> ec.EllipticCurvePrivateKey:
    """On the curve that Flower asks for."""
    return ec.generate_private_key(ec.SECP384R1())


def write_secret(path: Path, data: bytes) -> None:
    """A new file of mode 600.  Raises FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
) -> bytes:
    """Of an authority where no hosts are named."""
    now, public, own = datetime.datetime.now(datetime.UTC), key.public_key(), not hosts
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False
    )  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=own, path_length=0 if own else None), True)
        .add_extension(x509.KeyUsage(digital_signature=not own, key_cert_sign=own, crl_sign=own, **usage), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
    )
    if hosts:
        made = made.add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), False)
    return made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)

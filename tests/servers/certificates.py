"""A certificate authority for the HTTPS servers of the tests."""

import datetime as dt
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def write_authority(folder: Path) -> Path:
    """Write `ca.pem`, and `host.pem` with key and certificate of two hosts; return the folder."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name.from_rfc4514_string("CN=An authority for tests")
    names = [x509.DNSName(name) for name in ("images.example", "cdn.example")]
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    use = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    now = dt.datetime.now(dt.UTC)

    def signed(
        name: x509.Name, key: ec.EllipticCurvePrivateKey, *more: x509.ExtensionType
    ) -> bytes:
        builder = x509.CertificateBuilder(ca_name, name, key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - dt.timedelta(days=1))
        builder = builder.not_valid_after(now + dt.timedelta(days=1))
        for extension in more:
            critical = isinstance(extension, (x509.BasicConstraints, x509.KeyUsage))
            builder = builder.add_extension(extension, critical)
        certificate = builder.sign(ca_key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM)

    (folder / "ca.pem").write_bytes(
        signed(ca_name, ca_key, x509.BasicConstraints(True, None), use, ca_id)
    )
    (folder / "host.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed(
            x509.Name.from_rfc4514_string("CN=images.example"),
            key,
            x509.SubjectAlternativeName(names),
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id),
        )
    )
    return folder

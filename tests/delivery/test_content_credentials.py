"""Content Credentials, checked with the reader of the C2PA library."""

import datetime as dt
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import SecretStr

from ourvidz_serverless.delivery import images, provenance, video
from ourvidz_serverless.delivery.content_credentials import UNSIGNED, Credentials
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.servers.handler import run_handler

MakeLocal = Callable[..., LocalWorker]
MAKE_KEY: dict[str, Callable[[], Any]] = {
    "Es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Ps256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


class Authority:
    """A root certificate that the reader trusts."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name.from_rfc4514_string("CN=Root,O=An authority for tests")
        use = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.root = self._signed(self._name, self._key, x509.BasicConstraints(True, None), use)

    def chain(self, key: Any) -> str:
        """The certificate of a signer with this key, followed by the root certificate."""
        use = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        return self.root_of(key, use) + self.root

    def root_of(self, key: Any, use: x509.KeyUsage) -> str:
        return self._signed(
            x509.Name.from_rfc4514_string("CN=A signer,O=An authority for tests"),
            key,
            x509.BasicConstraints(False, None),
            use,
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]),
        )

    def _signed(self, subject: x509.Name, key: Any, *more: x509.ExtensionType) -> str:
        now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
        mine = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        own = (
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(mine),
        )
        builder = x509.CertificateBuilder(
            self._name,
            subject,
            key.public_key(),
            x509.random_serial_number(),
            now - day,
            now + 30 * day,
        )
        for extension in (*more, *own):
            critical = isinstance(extension, (x509.BasicConstraints, x509.KeyUsage))
            builder = builder.add_extension(extension, critical)
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM).decode()


def pem(key: Any) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def pair(authority: Authority) -> tuple[str, str]:
    """A certificate chain and its key."""
    key = MAKE_KEY["Es256"]()
    return authority.chain(key), pem(key)


@pytest.fixture(scope="module")
def mismatched(authority: Authority, pair: tuple[str, str]) -> tuple[str, str]:
    return authority.chain(MAKE_KEY["Es256"]()), pair[1]


def read(data: bytes, mime: str, authority: Authority) -> Any:
    trust = {"trust": {"trust_anchors": authority.root}, "verify": {"verify_trust": True}}
    context = c2pa.Context(c2pa.Settings.from_dict(trust))
    return c2pa.Reader(mime, io.BytesIO(data), context=context)


def picture() -> Any:
    return np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)


# --- one file ---


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("algorithm", MAKE_KEY)
def test_a_c2pa_reader_trusts_a_signed_picture(
    authority: Authority, algorithm: str, format: Any
) -> None:
    key = MAKE_KEY[algorithm]()
    file = images.encode_image(picture(), format)

    signed = Credentials(authority.chain(key), pem(key)).sign(file.data, file.mime, False, [])

    reader = read(signed, file.mime, authority)
    assert reader.get_validation_state() == "Trusted"
    assert reader.get_active_manifest()["signature_info"]["alg"] == algorithm


def test_a_c2pa_reader_trusts_a_signed_video(authority: Authority, pair: tuple[str, str]) -> None:
    encoded = video.encode_video([np.stack([picture()] * 5)], 96, 64, 16, False)

    signed = Credentials(*pair).sign(encoded.data, "video/mp4", False, [])

    assert len(signed) > len(encoded.data)
    assert read(signed, "video/mp4", authority).get_validation_state() == "Trusted"


def test_a_c2pa_reader_refuses_a_file_that_was_changed(
    authority: Authority, pair: tuple[str, str]
) -> None:
    file = images.encode_image(picture())
    signed = bytearray(Credentials(*pair).sign(file.data, file.mime, False, []))
    signed[-20] ^= 1

    assert read(bytes(signed), file.mime, authority).get_validation_state() == "Invalid"


@pytest.mark.parametrize(
    ("composite", "source"), [(False, provenance.TRAINED), (True, provenance.COMPOSITE)]
)
def test_a_manifest_states_the_source_type_and_the_generator_only(
    authority: Authority, pair: tuple[str, str], composite: bool, source: str
) -> None:
    file = images.encode_image(picture())

    signed = Credentials(*pair).sign(file.data, file.mime, composite, [])

    manifest = read(signed, file.mime, authority).get_active_manifest()
    action = {"action": "c2pa.created", "digitalSourceType": source}
    assert [each["data"] for each in manifest["assertions"]] == [{"actions": [action]}]
    assert manifest["claim_generator_info"][0]["name"] == "ourvidz-serverless"
    assert "thumbnail" not in manifest
    assert (
        provenance.digital_source_type(signed) == provenance.TRAINED
    )  # The XMP mark is unchanged.


# --- a job ---


def test_a_signed_asset_states_its_signed_size(
    local: MakeLocal, authority: Authority, pair: tuple[str, str]
) -> None:
    worker = local(credentials=Credentials(*pair))

    (asset,) = worker.run(sdxl_payload(prompt="a zebra")).assets

    data = (worker.root / asset.url).read_bytes()
    reader = read(data, "image/png", authority)
    assert reader.get_validation_state() == "Trusted"
    assert asset.metadata["file_size_bytes"] == len(data)
    assert "zebra" not in reader.json()
    assert "user-1" not in reader.json()


def test_an_asset_that_cannot_be_signed_is_delivered_with_a_warning(
    local: MakeLocal, mismatched: tuple[str, str]
) -> None:
    worker = local(credentials=Credentials(*mismatched))

    document = worker.run(sdxl_payload(config={"num_images": 3}))

    assert (document.status, len(document.assets)) == ("completed", 3)
    assert document.metadata["warnings"] == [UNSIGNED]


def test_a_job_fails_if_a_required_signature_fails(
    local: MakeLocal, mismatched: tuple[str, str]
) -> None:
    document = local(credentials=Credentials(*mismatched, required=True)).run()

    assert document.failure is not None
    assert (document.failure.code, document.failure.message) == ("INTERNAL_ERROR", UNSIGNED)
    assert document.assets == ()


# --- the environment ---


def test_the_c2pa_settings_hold_pem_texts_or_paths_of_pem_files(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    for name, text in zip(("chain", "key"), pair, strict=True):
        (tmp_path / name).write_text(text)
    as_text = Settings(c2pa_cert=pair[0], c2pa_key=SecretStr(pair[1].replace("\n", "\\n")))
    as_files = Settings(
        c2pa_cert=str(tmp_path / "chain"), c2pa_key=SecretStr(str(tmp_path / "key"))
    )

    for settings in (as_text, as_files):
        assert Credentials.of(settings) is not None
    assert Credentials.of(Settings()) is None


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"require_c2pa": True}, "C2PA_CERT: needs both"),
        ({"c2pa_cert": "-----BEGIN"}, "C2PA_CERT: needs both"),
        ({"c2pa_cert": "/no/such", "c2pa_key": "/no/such"}, "C2PA_CERT: neither PEM nor a file"),
        ({"c2pa_cert": "-----BEGIN", "c2pa_key": "-----BEGIN"}, "C2PA_KEY: Input should be a priv"),
    ],
)
def test_an_incomplete_c2pa_configuration_ends_the_start(env: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelLoadError) as refused:
        Credentials.of(Settings(**env))

    assert refused.value.message.startswith(why)
    assert "/no/such" not in refused.value.message


def test_a_start_without_the_c2pa_package_says_what_to_install(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)

    with pytest.raises(ModelLoadError, match="needs requirements-c2pa"):
        Credentials(*pair)


def test_the_handler_signs_and_logs_no_key(
    pair: tuple[str, str], authority: Authority, tmp_path: Path
) -> None:
    run = run_handler(
        "--test_input",
        json.dumps({"input": sdxl_payload()}),
        STORAGE_URL=f"file:{tmp_path}",
        C2PA_CERT=pair[0],
        C2PA_KEY=pair[1],
        REQUIRE_C2PA="1",
    )

    assert run.returncode == 0, run.stderr
    data = (tmp_path / "user-1/job-1/0.png").read_bytes()
    assert read(data, "image/png", authority).get_validation_state() == "Trusted"
    assert pair[1].splitlines()[1] not in run.stdout + run.stderr

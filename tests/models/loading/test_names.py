"""What a setting's value names beside a path: a repository of the Hub, or a URL."""

import pytest

from ourvidz_serverless.models.loading import names
from ourvidz_serverless.models.loading.names import HubName, UrlName

SHA256 = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@v1", HubName("org/name", "v1")),
        ("org/name@v1/sub/x.safetensors", HubName("org/name", "v1", "sub/x.safetensors")),
        ("https://host/x.safetensors", UrlName("https://host/x.safetensors")),
        (f"https://host/x#sha256={SHA256.upper()}", UrlName("https://host/x", SHA256)),
        ("checkpoint.safetensors", None),
        ("/models/org/name", None),
    ],
)
def test_a_name_is_a_repository_a_url_or_neither(text: str, name: HubName | UrlName | None) -> None:
    assert names.parse(text) == name


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("https://host/a/My%20Model.safetensors?x=1", "My_Model.safetensors"),
        ("https://civitai.com/api/download/models/128713?type=Model", "128713.safetensors"),
        ("https://host/", "checkpoint.safetensors"),
        ("https://host/..", "checkpoint.safetensors"),
    ],
)
def test_a_urls_file_has_a_plain_name(url: str, file: str) -> None:
    assert UrlName(url).file == file


def test_signed_urls_of_one_file_have_one_place() -> None:
    one, other = (UrlName(f"https://host/x?v=1&X-Amz-Signature={n}&X-Amz-Date={n}") for n in "12")

    assert one.place == other.place


@pytest.mark.parametrize("other", ["https://host/x?v=2", "https://other/x?v=1"])
def test_different_files_have_different_places(other: str) -> None:
    assert UrlName("https://host/x?v=1").place != UrlName(other).place


def test_a_url_with_another_hash_is_another_file() -> None:
    assert UrlName("https://host/x").place != UrlName("https://host/x", SHA256).place


@pytest.mark.parametrize("shown", [names.short, names.public])
def test_no_form_for_people_has_a_secret_of_a_url(shown: object) -> None:
    assert callable(shown)
    text = shown("https://user:secret@host/x.safetensors?token=secret#secret")

    assert "secret" not in text
    assert "x.safetensors" in text

"""The application's Supabase project: to which URLs its service key is sent, in which headers.

https://supabase.com/docs/guides/functions/auth-headers says which key belongs in which header.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.net.addresses import is_loopback, origin
from ourvidz_serverless.settings import Settings

#: How a new secret key begins. It is no JSON Web Token, so gateways refuse it as a bearer token.
SECRET_KEY = "sb_secret_"


@dataclass(frozen=True, slots=True)
class Project:
    """One project's URL and its service key."""

    url: str
    key: str = field(repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Project | None:
        """The project of the settings; None without its URL or its key.

        Raises ModelLoadError for a URL that would send the key without encryption.
        """
        url, key = settings.supabase_url, settings.supabase_service_key
        if not (url and key):
            return None
        scheme, host, _ = origin(url)
        if scheme != "https" and not is_loopback(host):
            raise ModelLoadError(
                "SUPABASE_URL: Input should begin with https://, since SUPABASE_SERVICE_KEY goes "
                "there; http:// is for 127.0.0.1 and localhost"
            )
        return cls(url.rstrip("/"), key.get_secret_value())

    @property
    def headers(self) -> dict[str, str]:
        """The headers with the key, for the project's own URLs."""
        return key_headers(self.key)

    def has(self, url: str) -> bool:
        """Whether a URL is of the project's own origin: scheme, host and port."""
        return origin(url) == origin(self.url)


def key_headers(key: str) -> dict[str, str]:
    """The headers for a service key. An old key, which is a JWT, is a bearer token too."""
    bearer = {} if key.startswith(SECRET_KEY) else {"Authorization": f"Bearer {key}"}
    return {"apikey": key, **bearer}

"""What a caller shows a collector: files, each read anew at every connection. Loads nothing heavy."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from insitu.pem import BadPem, try_authorities, try_client

_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
"""What may stand behind `Bearer`."""


class CredentialError(ValueError):
    """A credential that cannot be used: one line that names it and what to do, never what is in it."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Paths of files, or None. What they hold is in no field, so no log and no representation can show it.

    Each method reads its file, and raises CredentialError where that cannot be used.
    """

    token_file: str | None = None
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None

    def token(self) -> str | None:
        """Return the token, without the line's end."""
        if self.token_file is None:
            return None
        text = _read(self.token_file, "token_file").decode("utf-8", "replace").strip()
        if not _TOKEN.fullmatch(text):
            raise CredentialError(
                f"token_file {self.token_file} holds no token: one line without spaces, as `insitu token new` prints it"
            )
        return text

    def ca(self) -> bytes | None:
        """Return the certificates of the authorities that collectors are believed by; None: those that gRPC knows."""
        if self.ca_file is None:
            return None
        data = _read(self.ca_file, "ca_file")
        try:
            try_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self.ca_file)
        except BadPem as error:
            raise CredentialError(f"ca_file {error} (INSITU_CA_FILE)") from None
        return data

    def pair(self) -> tuple[bytes, bytes] | None:
        """Return this caller's own key and chain of certificates."""
        if self.client_cert is None and self.client_key is None:
            return None
        if self.client_cert is None or self.client_key is None:
            given, missing = ("client_cert", "client_key") if self.client_key is None else ("client_key", "client_cert")
            raise CredentialError(f"{given} is set and {missing} is not; set INSITU_{missing.upper()}, too")
        found = _read(self.client_key, "client_key"), _read(self.client_cert, "client_cert")
        try:
            try_client(self.client_cert, self.client_key)
        except BadPem as error:
            raise CredentialError(f"{error} (INSITU_CLIENT_CERT, INSITU_CLIENT_KEY)") from None
        return found

    def check(self) -> None:
        """Read everything once. Raises CredentialError."""
        self.token(), self.ca(), self.pair()

    @property
    def named(self) -> list[str]:
        """Names of those that are set."""
        return [name for name in self.__slots__ if getattr(self, name) is not None]


NONE: Final = Credentials()


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CredentialError(f"{name} {path} cannot be read: {reason}; see INSITU_{name.upper()}") from None

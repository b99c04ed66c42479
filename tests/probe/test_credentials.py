"""What a caller shows: files, read anew each time; what is wrong is one line that does not say what they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from insitu import doctor
from insitu.config import load
from insitu.credentials import NONE, CredentialError, Credentials
from insitu.doctor import Status

SECRET = "insitu_" + "s" * 43


def written(path: Path, data: bytes, mode: int = 0o600) -> str:
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_without_files_nothing_is_shown() -> None:
    assert (NONE.token(), NONE.ca(), NONE.pair(), NONE.named) == (None, None, None, [])


def test_files_are_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "token"
    shown = Credentials(token_file=written(path, b"first\n"))
    assert shown.token() == "first"
    path.write_text("  second\r\n")
    assert shown.token() == "second"
    assert "second" not in repr(shown)


@pytest.mark.parametrize("data", [b"", b"\n", b"two words", b"two\nlines", b"\xff\xfe", "ß".encode(), b"a\x00b"])
def test_what_is_no_token_is_not_repeated(tmp_path: Path, data: bytes) -> None:
    path = written(tmp_path / "token", data + b" " + SECRET.encode() if data.strip() else data)
    with pytest.raises(CredentialError) as error:
        Credentials(token_file=path).token()
    assert str(error.value) == (
        f"token_file {path} holds no token: one line without spaces, as `insitu token new` prints it"
    )


READS: list[tuple[dict[str, Any], Callable[[Credentials], Any], str]] = [
    ({"token_file": "/no/token"}, Credentials.token, "token_file /no/token cannot be read: no such file"),
    ({"ca_file": "/no/ca"}, Credentials.ca, "ca_file /no/ca cannot be read: no such file or directory; see INSITU_CA"),
    ({"client_cert": "/x"}, Credentials.pair, "client_cert is set and client_key is not; set INSITU_CLIENT_KEY, too"),
    ({"client_key": "/x"}, Credentials.pair, "client_key is set and client_cert is not; set INSITU_CLIENT_CERT, too"),
    ({"ca_file": __file__}, Credentials.ca, f"ca_file {__file__} has no certificate in PEM; give a file"),
    ({"client_cert": __file__, "client_key": __file__}, Credentials.pair, f"{__file__} has no certificate in PEM;"),
]


@pytest.mark.parametrize(("fields", "read", "said"), READS)
def test_what_cannot_be_used_is_named(fields: dict[str, Any], read: Callable[[Credentials], Any], said: str) -> None:
    with pytest.raises(CredentialError, match=said.replace("(", r"\(")) as error:
        read(Credentials(**fields))
    assert len(str(error.value).splitlines()) == 1


def test_settings_name_the_files(tmp_path: Path) -> None:
    names = ("token_file", "ca_file", "client_cert", "client_key")
    found = load(tmp_path, {f"INSITU_{name.upper()}": f"/{name}" for name in names}).credentials
    assert found == Credentials("/token_file", "/ca_file", "/client_cert", "/client_key")
    assert found.named == list(names)


def test_doctor_says_that_one_is_set_and_not_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_credentials(load(tmp_path).credentials).why.startswith("none set")
    path = written(tmp_path / "token", SECRET.encode())
    monkeypatch.setenv("INSITU_TOKEN_FILE", path)
    ca = trustme.CA().cert_pem.bytes()
    monkeypatch.setenv("INSITU_CA_FILE", written(tmp_path / "ca.pem", ca, 0o644))
    check = doctor.check_credentials(load(tmp_path).credentials)
    assert (check.status, check.why) == (Status.OK, "set and readable: token_file, ca_file")
    Path(path).chmod(0o644)
    check = doctor.check_credentials(load(tmp_path).credentials)
    assert (check.status, check.fix) == (Status.WARN, f"chmod 600 {path}")
    Path(path).write_text(f"{SECRET} {SECRET}")
    check = doctor.check_credentials(load(tmp_path).credentials)
    assert check.status is Status.PROBLEM and SECRET not in check.why + check.fix
    monkeypatch.setenv("INSITU_CLIENT_CERT", "/x")
    monkeypatch.delenv("INSITU_TOKEN_FILE")
    check = doctor.check_credentials(load(tmp_path).credentials)
    assert (check.status, check.fix) == (Status.PROBLEM, "set INSITU_CLIENT_KEY, too")

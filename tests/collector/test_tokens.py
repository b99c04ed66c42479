"""The tokens file as text: what is written is read again, and what is wrong is said without what it holds."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.access.roles import Role
from insitu_collector.access.tokens import (
    NAME,
    PREFIX,
    BadTokens,
    Entry,
    changes,
    digest_of,
    new_token,
    of_names,
    of_token,
    parse_tokens,
)

NOON = datetime(2027, 1, 31, 12, tzinfo=UTC)
DIGEST = digest_of("a token")
SECRET = PREFIX + "s" * 43


def entry(name: str = "rank-0", **more: Any) -> Entry:
    return Entry(**{"name": name, "roles": frozenset({Role.SHIP}), "sha256": digest_of(name), **more})


known_by = st.one_of(
    st.fixed_dictionaries({"sha256": st.text("0123456789abcdef", min_size=64, max_size=64)}),
    st.fixed_dictionaries({"san": st.from_regex(r"[a-z]{2,8}(://[a-z./-]{1,20})?", fullmatch=True)}),
)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
entries = st.builds(
    lambda name, roles, tenant, known, expires: Entry(name, roles, tenant, expires=expires, **known),
    st.from_regex(NAME, fullmatch=True),
    st.frozensets(st.sampled_from(list(Role)), min_size=1),
    st.one_of(st.just(""), st.from_regex(r"[a-z0-9_-]{1,64}", fullmatch=True)),
    known_by,
    st.one_of(st.none(), st.datetimes(timezones=zones, min_value=datetime(1971, 1, 1))),
)
files = st.lists(entries, max_size=5, unique_by=(lambda each: each.name, lambda each: each.sha256 or each.san))


def taken(text: str) -> tuple[Entry, ...]:
    """Return the entries of a text; none where it is refused, which is said in a line that holds no secret."""
    try:
        return parse_tokens(text)
    except BadTokens as error:
        said = str(error)
    assert len(said.splitlines()) == 1 and SECRET not in said
    return ()


@given(files)
def test_what_is_written_is_read_again(written: list[Entry]) -> None:
    assert parse_tokens("\n".join(each.toml() for each in written)) == tuple(written)


@given(st.text())
def test_any_text_is_entries_or_one_line(text: str) -> None:
    assert isinstance(taken(text), tuple)


KEYS = st.one_of(st.sampled_from(["name", "sha256", "san", "tenant", "roles", "expires", SECRET]), st.text(max_size=5))
VALUES = st.one_of(
    st.text(max_size=9),
    st.integers(),
    st.booleans(),
    st.lists(st.one_of(st.sampled_from(["ship", "admin"]), st.text(max_size=3), st.integers()), max_size=3),
    st.sampled_from(["rank-0", "team-a", DIGEST, SECRET, "2027-01-31T00:00:00Z"]),
)


@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=6), max_size=3))
def test_any_table_is_entries_or_one_line_and_what_is_taken_is_sound(tables: list[dict[str, Any]]) -> None:
    lines = (["[[token]]", *(f"{json.dumps(key)} = {json.dumps(each[key])}" for key in each)] for each in tables)
    for each in taken("\n".join(chain.from_iterable(lines))):
        assert each.roles and bool(each.sha256) != bool(each.san)
        assert parse_tokens(each.toml()) == (each,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("token = 5", "write [[token]]"),
        ("[other]", "no key 'other'"),
        ("[[token]]\nname =", "no TOML; write [[token]]"),
        ("[[token]]\nname = !", "no TOML, line 2"),
        ('[[token]]\nname = "a b"', "entry 1: `name` is to be"),
        (f'[[token]]\nname = "{SECRET}"', "entry 1: `name` is to be"),
        (f'[[token]]\nname = "a"\nsha256 = "{DIGEST}"\nroles = []', "`roles` is to be a list of ship, read, admin"),
        (f'[[token]]\nname = "a"\nsha256 = "{DIGEST}"\nroles = ["root"]', "`roles` is to be"),
        ('[[token]]\nname = "a"\nroles = ["ship"]', "give `sha256` of its token, or `san`"),
        (f'[[token]]\nname = "a"\nsha256 = "{DIGEST}"\nsan = "b"\nroles = ["ship"]', "give `sha256`"),
        ('[[token]]\nname = "a"\nsha256 = "secret"\nroles = ["ship"]', "64 hex digits"),
        (f'[[token]]\nname = "a"\nsha256 = "{DIGEST}"\ntenant = "../up"\nroles = ["ship"]', "`tenant` is to be a-z"),
        (f'[[token]]\nname = "a"\nsha256 = "{DIGEST}"\ntoken = "x"\nroles = ["ship"]', "no key 'token'; the keys are"),
        (f'[[token]]\nname = "a"\nsha256 = "{DIGEST}"\nexpires = 2027-01-31\nroles = ["ship"]', "with its zone"),
        (f'[[token]]\nname = "a"\nsha256 = "{DIGEST}"\nexpires = 2027-01-31T00:00:00\nroles = ["ship"]', "its zone"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(BadTokens) as error:
        parse_tokens(text)
    assert said in str(error.value)
    assert not any(secret in str(error.value) for secret in ("secret", DIGEST, SECRET))


@pytest.mark.parametrize("key", ["name", "sha256", "san"])
def test_two_entries_share_nothing_that_says_who_they_are(key: str) -> None:
    one = entry("a", san="x", sha256="") if key == "san" else entry("a")
    other = {"name": entry("a", sha256=DIGEST), "sha256": entry("b", sha256=one.sha256)}.get(
        key, entry("b", san="x", sha256="")
    )
    with pytest.raises(BadTokens, match=f"entries a and [ab] have one {key}"):
        parse_tokens(one.toml() + other.toml())


def test_a_token_is_known_by_its_digest_and_a_certificate_by_a_name() -> None:
    made = new_token()
    assert made.startswith(PREFIX) and len(made) > 40 and made != new_token()
    mine, cert = entry("mine", sha256=digest_of(made)), entry("cert", sha256="", san="spiffe://x/y")
    assert of_token([entry(), cert, mine], made) == mine
    assert of_token([entry(), cert, mine], made[:-1]) is None
    assert of_token([entry(), cert], "") is None
    assert of_names([mine, cert], ["other", "spiffe://x/y"]) == cert
    assert of_names([mine, cert], ["", "spiffe://x"]) is None


def test_an_entry_is_over_from_its_time_on() -> None:
    found = entry(expires=NOON)
    assert not found.is_over(NOON.timestamp() - 1)
    assert found.is_over(NOON.timestamp())
    assert not entry().is_over(1e12)


def test_what_changed_is_told_in_names() -> None:
    before = [entry("a"), entry("b"), entry("c")]
    after = [entry("b"), entry("c", tenant="t"), entry("d")]
    assert changes(before, after) == "added d; removed a; changed c"
    assert changes(after, after) == "nothing changed"

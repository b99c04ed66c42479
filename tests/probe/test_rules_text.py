"""Rules as text come back as they were, and what is no rule says where and why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.rules.rule import Rule, RuleError
from insitu.rules.text import MAX_RULES, parse_rule, parse_toml, rule_text, to_toml

FILE = """
[[rules]]
sites = "L*.resid_post"
requests = 0.01
rows = "last"
cast = "bf16"
max_bytes_per_s = "64MiB"

[[rules]]
sites = "*"
take = "summary"
every = 64
phase = "decode"
"""
ROW_RULES = st.builds(
    Rule,
    sites=st.sampled_from(["*", "L[0-7].mlp_out", 'module:a "quoted" \\ glob', "ü\t*"]),
    requests=st.one_of(st.sampled_from(["all", "opt-in"]), st.floats(1e-9, 1.0)),
    rows=st.sampled_from(["all", "last", "first:3", "every:16"]),
    phase=st.sampled_from([None, "prefill", "decode"]),
    cast=st.sampled_from([None, "bf16", "fp16", "fp8"]),
    topk=st.one_of(st.none(), st.integers(1, 99)),
    max_bytes_per_s=st.one_of(st.none(), st.integers(1, 1 << 40), st.just("64MiB")),
)
SUMMARIES = st.builds(
    Rule,
    sites=st.just("*"),
    take=st.just("summary"),
    every=st.one_of(st.none(), st.integers(1, 99)),
    phase=st.sampled_from([None, "mixed"]),
)


def test_a_file_is_read_in_order() -> None:
    assert parse_toml(FILE) == (
        Rule(sites="L*.resid_post", requests=0.01, rows="last", cast="bf16", max_bytes_per_s="64MiB"),
        Rule(sites="*", take="summary", every=64, phase="decode"),
    )
    assert parse_toml(b"") == ()


@given(st.lists(st.one_of(ROW_RULES, SUMMARIES), max_size=5))
def test_rules_come_back_from_toml_as_they_were(rules: list[Rule]) -> None:
    assert parse_toml(to_toml(rules)) == tuple(rules)


@given(ROW_RULES.filter(lambda rule: "," not in rule.sites and rule.sites == rule.sites.strip()))
def test_a_rule_comes_back_from_its_line(rule: Rule) -> None:
    assert parse_rule(rule_text(rule)) == rule


def test_a_line_names_its_sites_first_or_by_name() -> None:
    assert parse_rule("1,requests=0.5") == Rule(sites="1", requests=0.5), "a module may have a number for a name"
    assert parse_rule("logits, topk=64") == parse_rule("sites=logits,topk=64") == Rule(sites="logits", topk=64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules = 3", "rules is no array of tables; write each rule as [[rules]]"),
        ("[[rule]]", "no key 'rule'; rules are [[rules]] tables with the keys sites, take, "),
        ("[[rules]]\nsite = '*'", "rule 1: no key 'site' (did you mean 'sites'?); the keys are sites, take, "),
        ("[[rules]]\nsites='*'\n[[rules]]\nrows='last'", "rule 2: it names no sites"),
        ("[[rules]]\nsites='*'\ncast='int4'", "rule 1: cast='int4' is not known"),
        ("[[rules]", "not TOML: "),
        (b"\xff", "not TOML: "),
        ("[[rules]]\nsites='*'\n" * (MAX_RULES + 1), f"{MAX_RULES + 1} rules; the most are {MAX_RULES}"),
    ],
)
def test_what_is_no_file_of_rules_says_so_in_one_line(text: str | bytes, message: str) -> None:
    with pytest.raises(RuleError) as raised:
        parse_toml(text)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*,last", "--rule '*,last': 'last' is no KEY=VALUE; the keys are sites, take, "),
        ("*,row=last", "--rule '*,row=last': no key 'row' (did you mean 'rows'?)"),
        ("*,rows=last,rows=all", "--rule '*,rows=last,rows=all': rows is given twice"),
        ("*,requests=1.5", "--rule '*,requests=1.5': requests=1.5 is not known"),
        ("", "--rule '': sites='' is no glob"),
    ],
)
def test_what_is_no_rule_says_so_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RuleError) as raised:
        parse_rule(text)
    assert str(raised.value).startswith(message)

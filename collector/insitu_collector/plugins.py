"""Verdicts of other packages: the entry-point group `insitu.verdicts`, and the boundary their errors stop at.

Public, with `insitu_collector.verdicts.Finding` and what `Rule` says may be read. How to write one: docs/extending.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, Protocol

import pyarrow as pa

from insitu.guard import raises_again
from insitu.plugins.discovery import VERDICTS, Plugin, wanted
from insitu.records import schema_of
from insitu.vocabulary import NAMESPACED
from insitu_collector.evidence import Evidence
from insitu_collector.verdicts.finding import Finding

_log = logging.getLogger("insitu")

_STORED: Final = ("on_stage", "on_rank", "layer", "site", "step_id", "phase", "confidence", "text", "remedy")


class Rule(Protocol):
    """What a plug-in gives: the entry point is a class, or any callable without arguments, that makes one.

    One is made for each run and replica that is judged; it may remember what it saw.
    """

    def look(self, evidence: Evidence) -> Iterable[Finding]:
        """Return what this look finds: at each look all that holds, also what was found before.

        evidence: the last minute of the run, public attributes and methods of `Evidence`; nothing of it may be
        changed. Times of a finding are of its timeline (ns). No clock, no files: a store that is judged later must
        give the same. The judge waits for the answer, once a second.
        """
        ...


class Plugins:
    """The verdict plug-ins of one judge. One that raises, or finds what cannot be stored, is switched off."""

    def __init__(self, plugins: Sequence[Plugin] = ()) -> None:
        self.plugins = tuple(plugins)
        self._off: set[Plugin] = set()
        self._failures: list[str] = []

    def is_off(self, plugin: Plugin) -> bool:
        return plugin in self._off

    def take_failures(self) -> list[str]:
        """Return, once each, the sentences about plug-ins that failed."""
        told, self._failures = self._failures, []
        return told

    @contextmanager
    def containing(self, plugin: Plugin) -> Iterator[None]:
        """Stop what a plug-in raises, say it once, and switch the plug-in off. Under pytest it is raised again."""
        try:
            yield
        except Exception as error:
            if raises_again():
                raise
            text = f"the verdict plug-in {plugin} failed and is switched off: {type(error).__name__}: {error}"
            _log.error("insitu: %s", text, exc_info=error)
            self._failures.append(text)
            self._off.add(plugin)


class PluginRules:
    """The rules of a judge's plug-ins for one run and replica."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._rules: dict[Plugin, Rule] = {}
        self._kinds: dict[Plugin, set[str]] = {}
        for plugin in plugins.plugins:
            if not plugins.is_off(plugin):
                with plugins.containing(plugin):
                    self._rules[plugin] = plugin.load()()

    @property
    def undecided(self) -> frozenset[str]:
        """Kinds found by plug-ins that are off since: nobody can say whether they still hold."""
        off = (kinds for plugin, kinds in self._kinds.items() if self._plugins.is_off(plugin))
        return frozenset[str]().union(*off)

    def look(self, evidence: Evidence) -> list[Finding]:
        """Return what all of them find; those that fail find nothing, now and later."""
        found: list[Finding] = []
        for plugin, rule in self._rules.items():
            if not self._plugins.is_off(plugin):
                with self._plugins.containing(plugin):
                    findings = [storable(finding) for finding in rule.look(evidence)]
                    self._kinds.setdefault(plugin, set()).update(finding.kind for finding in findings)
                    found += findings
        return found


def storable(finding: Finding) -> Finding:
    """Return a plug-in's finding with the types that are stored.

    Raises ValueError or TypeError, in a sentence, for what is no finding, and for a kind without a namespace.
    """
    if not isinstance(finding, Finding):
        raise TypeError(f"{finding!r} is no insitu_collector.verdicts.Finding")
    if not isinstance(finding.kind, str) or not NAMESPACED.fullmatch(finding.kind):
        raise ValueError(f"the kind {finding.kind!r} has no namespace; write it like acme.thermal")
    if not math.isfinite(finding.size) or not 0 <= finding.confidence <= 1:
        raise ValueError(f"{finding.kind}: size must be finite and confidence within 0 to 1")
    if finding.t0_ns > finding.t1_ns:
        raise ValueError(f"{finding.kind}: it ends ({finding.t1_ns}) before it begins ({finding.t0_ns})")
    schema = schema_of("verdicts")
    typed = {name: pa.scalar(getattr(finding, name), schema.field(name).type).as_py() for name in _STORED}
    return replace(
        finding,
        **typed,
        t0_ns=int(finding.t0_ns),
        t1_ns=int(finding.t1_ns),
        size=float(finding.size),
        requests=tuple(str(request) for request in finding.requests),
        which=str(finding.which),
    )


def load_plugins() -> Plugins:
    """Return the verdict plug-ins that are installed and not switched off (`plugins_off`)."""
    return Plugins(wanted(VERDICTS))

"""What a verdict is, and the rule of each kind in a module of its own (`docs/verdicts.md`)."""

from insitu_collector.verdicts.finding import Finding

__all__ = ["Finding"]

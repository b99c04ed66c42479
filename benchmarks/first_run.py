"""First run: what a new user waits for, from a clone in an empty home to the verdict on the screen.

Clones the repository, runs `make demo` in a terminal of its own with an empty home and no cache, opens the page that
the demo names in a headless browser, and ends the demo by Ctrl-C once the page shows the verdict. Prints how long each
step took.

    python benchmarks/first_run.py
    python benchmarks/first_run.py --json --screenshot live.png
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

ROOT: Final = Path(__file__).resolve().parents[1]
VERDICT: Final = "limits the pipeline"
CHROMIUM: Final = "/usr/bin/chromium"
LONGEST_S: Final = 1200.0
STEPS: Final = (
    ("set up", r"==> ready", "`make demo` made its environment (downloads included)"),
    ("ready", r"ready after", "collector, judge and a two-stage engine answer requests"),
    ("page", r"the dashboard is on (http://\S+)", "the dashboard's address was told"),
    ("verdict", r"verdict after .*limits the pipeline", "the terminal named the slow stage"),
)
"""Name of a step, the line that ends it, and what has happened then."""


@dataclass
class Terminal:
    """A command in a terminal of its own; remembers when each line came."""

    command: list[str]
    folder: Path
    environment: dict[str, str]
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            self.command, cwd=self.folder, env=self.environment, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        threading.Thread(target=self._read, args=(ours,), daemon=True).start()

    def _read(self, ours: int) -> None:
        with open(ours, errors="replace", closefd=True) as screen:
            try:
                for line in screen:
                    with self._news:
                        self.lines.append((time.monotonic(), line.rstrip()))
                        self._news.notify_all()
            except OSError:  # a terminal whose last program has ended reads as an error
                pass

    def wait_for(self, pattern: str) -> tuple[float, re.Match[str]]:
        """Return when a line with `pattern` came, and the match. Raises ClickException when it does not."""

        def found() -> tuple[float, re.Match[str]] | None:
            hits = ((at, re.search(pattern, line)) for at, line in list(self.lines))
            return next(((at, hit) for at, hit in hits if hit), None)

        with self._news:
            if not self._news.wait_for(lambda: found() is not None, LONGEST_S):
                raise click.ClickException(f"{pattern!r} never came; the last lines: {self.lines[-3:]}")
        hit = found()
        assert hit is not None, "it was just there"
        return hit

    def interrupt(self) -> int:
        """Press Ctrl-C and return the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(60)


@contextmanager
def page_at(url: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(url)
        yield page
        browser.close()


def walk(folder: Path, screenshot: Path | None) -> list[tuple[str, float, str]]:
    """Return (step, seconds it took, what has happened then) of each step."""
    home = folder / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "TERM": "dumb", "PIP_NO_CACHE_DIR": "1"}
    environment.pop("VIRTUAL_ENV", None)
    began = time.monotonic()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "insitu")], check=True)
    took = [("clone", time.monotonic() - began, "the repository is there (from this disk)")]
    before = time.monotonic()
    terminal = Terminal(["make", "demo", "ARGS=--seconds 45"], folder / "insitu", environment)
    for name, pattern, meaning in STEPS[:3]:
        at, hit = terminal.wait_for(pattern)
        took.append((name, at - before, meaning))
        before = at
    with page_at(hit[1]) as page:
        page.get_by_text(VERDICT).first.wait_for(timeout=60_000)
        shown = time.monotonic()
        at, _ = terminal.wait_for(STEPS[3][1])
        took.append((STEPS[3][0], at - before, STEPS[3][2]))
        took.append(("on screen", max(0.0, shown - at), "the page showed it too, in a browser opened at its address"))
        if screenshot is not None:
            page.screenshot(path=str(screenshot))
        before = time.monotonic()
        terminal.interrupt()
    took.append(("ended", time.monotonic() - before, "Ctrl-C: every process has ended, the store is readable"))
    return took


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--screenshot", type=click.Path(path_type=Path), help="Where to keep a picture of the page.")
def main(as_json: bool, screenshot: Path | None) -> None:
    """Walk from a clone to the verdict on the screen."""
    with tempfile.TemporaryDirectory(prefix="insitu-first-run-") as folder:
        took = walk(Path(folder), screenshot)
    if as_json:
        steps = [{"step": name, "seconds": round(seconds, 1), "then": then} for name, seconds, then in took]
        click.echo(json.dumps({"schema": "insitu.first_run/1", "steps": steps}))
        return
    for name, seconds, then in took:
        click.echo(f"{name:<10} {seconds:>7.1f} s   {then}")
    click.echo(
        f"{'in all':<10} {sum(seconds for _, seconds, _ in took[:-1]):>7.1f} s   from nothing to the verdict on screen"
    )


if __name__ == "__main__":
    main()

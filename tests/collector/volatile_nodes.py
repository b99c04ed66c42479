"""Files and folders with two states: what processes see, and what is durable. What a power loss makes of a file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

SECTOR_BYTES: Final = 512


@dataclass(eq=False)
class Node:
    """A file or a folder."""

    number: int
    is_folder: bool
    data: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Writes since the last sync, each where and what; None: the file was cut there."""
    allocated: int = 0
    names: dict[str, Node] = field(default_factory=dict)
    durable_names: dict[str, Node] = field(default_factory=dict)
    mode: int = 0
    mtime_ns: int = 0


@dataclass(eq=False)
class Change:
    """A name that was set or removed, and is not durable yet."""

    folder: Node
    name: str
    node: Node | None
    after: Change | None = None
    """Never durable without this one: a rename removes the old name only once there is the new one."""


def after_a_loss(node: Node, chance: random.Random) -> bytearray:
    """Return what a power loss may leave of a file's bytes."""
    found = bytearray(node.durable)
    if chance.random() < 0.2:
        extend(found, len(node.data))
    how = chance.choice(["none", "all", "some", "sectors", "torn"])
    stop_at = chance.randint(len(node.durable), max(len(node.durable), len(node.data)))
    for at, data in node.unsynced:
        if data is None:
            if how != "none" and (how == "all" or chance.random() < 0.5):
                del found[at:]
        elif how == "all" or (how == "some" and chance.random() < 0.5):
            put(found, at, data)
        elif how == "torn" and at < stop_at:
            put(found, at, data[: stop_at - at])
        elif how == "sectors":
            for start, part in sectors(at, data):
                if chance.random() < 0.5:
                    put(found, start, part)
    return found


def flush(node: Node) -> None:
    """Make a file's writes and cuts durable, and nothing else that is seen: what a sync could not write is clean."""
    for at, data in node.unsynced:
        if data is None:
            del node.durable[at:]
        else:
            put(node.durable, at, data)
    node.unsynced = []


def apply(change: Change) -> None:
    """Make a change of names durable."""
    if change.node is None:
        change.folder.durable_names.pop(change.name, None)
    else:
        change.folder.durable_names[change.name] = change.node


def extend(data: bytearray, num_bytes: int) -> None:
    data.extend(bytes(max(0, num_bytes - len(data))))


def put(data: bytearray, at: int, part: bytes) -> None:
    """Write into bytes, with zeros up to there."""
    extend(data, at)
    data[at : at + len(part)] = part


def sectors(at: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield a write cut where sectors of the file begin."""
    start = 0
    while start < len(data):
        end = start + SECTOR_BYTES - (at + start) % SECTOR_BYTES
        yield at + start, data[start:end]
        start = end

"""Copies of sealed segments and their twins on another file system, each compared with what it is a copy of."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs as pafs

from insitu.segments.erased_file import ErasedFile
from insitu.segments.layout import SEALED, SegmentName, list_segments
from insitu.segments.whole import NewerFormat, NotWhole, WholeSegment
from insitu_collector.keeping.orders import still_there
from insitu_collector.keeping.twins import list_twins, twin_path

SCHEMA: Final = "insitu.store-manifest/1"
MANIFEST: Final = "manifest.json"
CHUNK_BYTES: Final = 4 << 20
SAVE_EVERY: Final = 16
"""Files between two writings of the manifest: what is copied once more after a kill."""


class CannotExport(OSError):
    """One line: what failed, and what to do."""


@dataclass
class Uploaded:
    """What was copied this time."""

    copied: list[str] = field(default_factory=list)
    num_bytes: int = 0
    num_there: int = 0
    """Files that were there already."""
    removed: list[str] = field(default_factory=list)
    """Copies of segments that another one has taken the place of, or that hold what is erased."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What was not copied, and why."""


class Uploader:
    """Copies to one place. Stopped at any time, it goes on where it was. Raises CannotExport."""

    def __init__(self, store: Path, uri: str, place: tuple[pafs.FileSystem, str] | None = None) -> None:
        """uri: `file:///...`, `s3://...`, or whatever else `pyarrow.fs` reads. place: what it means, if known."""
        self._store = store
        self._uri = uri
        self._fs: pafs.FileSystem
        self._root: str
        try:
            self._fs, self._root = place or pafs.FileSystem.from_uri(uri)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise CannotExport(
                f"{uri} is no place to export to ({_line(error)}); write file:///DIR or s3://..."
            ) from None

    def run(self) -> Uploaded:
        """Copy what is not there yet, and remove what is no longer to be there."""
        result = Uploaded()
        try:
            manifest = self._load()
            self._copy_all(manifest, result)
            self._remove_replaced(manifest, result)
            self._save(manifest)
        except (OSError, pa.ArrowException) as error:
            raise CannotExport(
                f"cannot export to {self._uri}: {_line(error)}; what is there is kept, run the same again to go on"
            ) from None
        return result

    def _copy_all(self, manifest: dict[str, dict[str, Any]], result: Uploaded) -> None:
        for n, (name, path, what) in enumerate(self._due(result), 1):
            try:
                data = path.stat().st_size, _crc32(path)
            except FileNotFoundError:  # expired since
                continue
            known = manifest.get(name)
            if known is not None and (known["bytes"], known["crc32"]) == data:
                result.num_there += 1
                continue
            if name.startswith(f"{SEALED}/") and (why := self._refused(name, path, data)):
                result.left_out[name.removeprefix(f"{SEALED}/")] = why
                continue
            self._copy(path, name, data[1])
            manifest[name] = {"bytes": data[0], "crc32": data[1], **what}
            result.copied.append(name)
            result.num_bytes += data[0]
            if n % SAVE_EVERY == 0:
                self._save(manifest)

    def _due(self, result: Uploaded) -> Iterator[tuple[str, Path, dict[str, Any]]]:
        """Yield what is to be there: its name there, its file here, what the manifest says of it."""
        erased = ErasedFile(self._store).read()
        names = list_segments(self._store, SEALED)
        held_back = set(still_there(self._store, erased, {n.shard for n in names})) if erased else set()
        twins = set(list_twins(self._store))
        for name in names:
            if name in held_back:
                result.left_out[name.file] = "it holds what is erased; after `insitu store compact` it does not"
                continue
            path = name.path(self._store, SEALED)
            try:
                replaces = sorted(_replaces(path, name))
            except (NotWhole, KeyError) as error:
                result.left_out[name.file] = "newer" if isinstance(error, (NewerFormat, KeyError)) else str(error)
                continue
            except FileNotFoundError:
                continue
            yield f"sealed/{name.file}", path, {"replaces": replaces}
            if name in twins:
                twin = twin_path(self._store, name)
                yield f"twins/{name.table}/{twin.name}", twin, {}

    def _refused(self, name: str, path: Path, data: tuple[int, int]) -> str:
        """Return why a segment is not to be copied over what is there, or "". A sealed segment never changes."""
        try:
            for _ in WholeSegment(path, name.split("/")[1]).batches():
                pass
        except NotWhole as error:
            return f"damaged ({error}); what is there stays, `insitu store repair {self._store}` keeps what is whole"
        except FileNotFoundError:
            return "it has gone meanwhile"
        there = self._there(name)
        if there is None or there == data:
            return ""
        return "another one of this name is there and stays: export to another place, or move that one away"

    def _there(self, name: str) -> tuple[int, int] | None:
        """Return size and checksum of a copy, None where there is none."""
        path = f"{self._root}/{name}"
        if self._fs.get_file_info(path).type == pafs.FileType.NotFound:
            return None
        with self._fs.open_input_stream(path) as copy:
            num_bytes = crc32 = 0
            while chunk := copy.read(CHUNK_BYTES):
                num_bytes, crc32 = num_bytes + len(chunk), zlib.crc32(chunk, crc32)
        return num_bytes, crc32

    def _copy(self, path: Path, name: str, crc32: int) -> None:
        target = f"{self._root}/{name}"
        is_local = self._fs.type_name == "local"
        if is_local:  # object stores show an object when it is whole, a folder shows what is half there
            self._fs.create_dir(target.rpartition("/")[0], recursive=True)
        part = f"{target}.part" if is_local else target
        with path.open("rb") as source, self._fs.open_output_stream(part) as sink:
            while chunk := source.read(CHUNK_BYTES):
                sink.write(chunk)
        found = self._there(part.removeprefix(f"{self._root}/"))
        if found is None or found[1] != crc32:
            self._fs.delete_file(part)
            raise OSError(f"the copy of {name} is not what was copied")
        if is_local:
            self._fs.move(part, target)

    def _remove_replaced(self, manifest: dict[str, dict[str, Any]], result: Uploaded) -> None:
        """Remove copies that another copy has taken the place of: with them goes what was erased."""
        gone = set()
        for name, told in manifest.items():
            head, _, _ = name.rpartition("-")
            for number in told.get("replaces", ()):
                gone.add(f"{head}-{number:010}.arrow")
                gone.add(f"twins{head.removeprefix('sealed')}-{number:010}.parquet")
        twins = {f"twins/{n.table}/{twin_path(self._store, n).name}" for n in list_twins(self._store)}
        sealed = {f"sealed/{n.file}" for n in list_segments(self._store, SEALED)}
        # A twin that has gone here while its segment is there may have held what is erased.
        gone |= {
            name for name in manifest if name.startswith("twins/") and name not in twins and _segment_of(name) in sealed
        }
        for name in sorted(gone & manifest.keys()):
            if self._fs.get_file_info(f"{self._root}/{name}").type != pafs.FileType.NotFound:
                self._fs.delete_file(f"{self._root}/{name}")
            del manifest[name]
            result.removed.append(name)

    def _load(self) -> dict[str, dict[str, Any]]:
        path = f"{self._root}/{MANIFEST}"
        if self._fs.get_file_info(path).type == pafs.FileType.NotFound:
            return {}
        with self._fs.open_input_stream(path) as file:
            try:
                found = json.loads(file.read())
                return {row["name"]: {k: v for k, v in row.items() if k != "name"} for row in found["files"]}
            except (ValueError, KeyError, TypeError):
                return {}  # half a manifest: everything is compared and copied anew

    def _save(self, manifest: dict[str, dict[str, Any]]) -> None:
        said = {
            "schema": SCHEMA,
            "written_unix_ns": time.time_ns(),
            "files": [{"name": name, **told} for name, told in sorted(manifest.items())],
        }
        if self._fs.type_name == "local":
            self._fs.create_dir(self._root, recursive=True)
        with self._fs.open_output_stream(f"{self._root}/{MANIFEST}") as file:
            file.write(json.dumps(said, indent=1).encode())


def _replaces(path: Path, name: SegmentName) -> frozenset[int]:
    segment = WholeSegment(path, name.table)
    return segment.replaces | segment.replaced_before


def _segment_of(twin: str) -> str:
    return f"sealed{twin.removeprefix('twins').removesuffix('.parquet')}.arrow"


def _crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

"""What kind of file system a store lies on: locks and syncs hold on this machine's own, and not surely elsewhere."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Final

MOUNTS: Final = Path("/proc/self/mountinfo")
REMOTE: Final = re.compile(
    r"(nfs\d*|cifs|smb\d*|smbfs|afs|9p|ceph|lustre|glusterfs|beegfs|gpfs|ocfs2|fuse\.(sshfs|s3fs|gcsfuse|rclone|glusterfs.*))"
)
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")

_log = logging.getLogger("insitu")


def file_system_of(path: Path, mountinfo: str) -> str:
    """Return the type of the file system that a path lies on, by the text of `/proc/self/mountinfo`; "" if unknown."""
    best, kind = "", ""
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        parts = fields.split()
        if len(parts) < 5 or not rest:
            continue
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), parts[4])
        if len(point) >= len(best) and path.is_relative_to(point):  # the last of those on one point lies on top
            best, kind = point, rest.split()[0]
    return kind


def warn_of_remote(store: Path, mounts: Path = MOUNTS) -> bool:
    """Say so, once, where a store lies on another machine's disk; return whether it does."""
    try:
        kind = file_system_of(store.resolve(), mounts.read_text())
    except OSError:
        return False
    if not REMOTE.fullmatch(kind):
        return False
    _log.warning(
        "insitu: store %s lies on %s: a lock may not hold against another machine, and what is called durable may not "
        "be; keep stores on a local disk, and copy them with `insitu store export`",
        *(store, kind),
    )
    return True

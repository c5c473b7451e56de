"""Free space on a disk, and durable file names."""

import os
from pathlib import Path

from shared.errors import StoreFull


def free_bytes(folder: Path) -> int:
    """Return the free space of the folder's disk for this user. Raises `OSError`."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def check_room(folder: Path, min_free_bytes: int) -> None:
    """Check that the folder's disk has as many bytes free for this user as the watermark says.

    Raises `StoreFull`, and `OSError` if the disk cannot be examined.
    """
    if free_bytes(folder) < min_free_bytes:
        raise StoreFull(
            f"{folder}: its disk has less free space than STOWGATE_MIN_FREE_BYTES, which is "
            f"{min_free_bytes}; free some space"
        )


def sync_folder(folder: Path | str) -> None:
    """Make the names in a folder durable, which fsync of a file does not (POSIX fsync, rename)."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

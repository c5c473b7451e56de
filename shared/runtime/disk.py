"""Free space on a disk, and durable file names."""

import os
from pathlib import Path


def has_room(folder: Path, min_free_bytes: int) -> bool:
    """Whether the folder's disk has that many bytes free for this user. Raises `OSError`."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize >= min_free_bytes


def sync_folder(folder: Path | str) -> None:
    """Make the names in a folder durable, which fsync of a file does not (POSIX fsync, rename)."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

"""Free space, and names that survive a power failure."""

import os
from pathlib import Path


def has_room(folder: Path, min_free_bytes: int) -> bool:
    """Whether so many bytes are free to this user on the folder's disk. Raises `OSError`."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize >= min_free_bytes


def sync_folder(folder: Path | str) -> None:
    """Make a name in it durable: fsync of the file alone does not (POSIX fsync, rename)."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

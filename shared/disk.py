"""What a disk has left."""

import os
from pathlib import Path


def has_room(folder: Path, min_free_bytes: int) -> bool:
    """Whether so many bytes are free to this user on the folder's disk. Raises `OSError`."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize >= min_free_bytes

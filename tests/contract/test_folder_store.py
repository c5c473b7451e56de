"""What only the folder store does."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from disks import small_disk
from object_stores import MIB, TEXT, at_once, keys, put

from shared.adapters.folder.store import FolderObjectStore
from shared.errors import ObjectMissing, StoreFull, StoreRefused

ROOT = Path(__file__).resolve().parents[2]


def child(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


PUT_HALF = """
import io, sys
from pathlib import Path
from shared.adapters.folder.store import FolderObjectStore

class Half(io.RawIOBase):
    left = 4
    def read(self, size=-1):
        if not self.left:
            print("half", flush=True)
            sys.stdin.read()
        self.left -= 1
        return bytes(size)

FolderObjectStore(Path(sys.argv[1])).put("a/key", Half(), 1 << 30, "text/plain")
"""


def test_folder_killed_during_a_put_leaves_no_partial_object(
    folder: FolderObjectStore, tmp_path: Path
) -> None:
    with child(PUT_HALF, str(tmp_path / "bucket")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    (leftover,) = (tmp_path / "bucket" / ".tmp").iterdir()
    assert leftover.stat().st_size >= 4 * MIB
    assert keys(folder) == []
    with pytest.raises(ObjectMissing):
        folder.get("a/key")


def test_folder_removes_old_temporary_files(folder: FolderObjectStore, tmp_path: Path) -> None:
    old, of_next_year, young = (
        tmp_path / "bucket" / ".tmp" / name for name in ("old", "of_next_year", "young")
    )
    for leftover in (old, of_next_year, young):
        leftover.write_bytes(b"half")
    two_hours_ago, next_year = time.time() - 7200, time.time() + 365 * 86400
    os.utime(old, (two_hours_ago, two_hours_ago))
    os.utime(of_next_year, (next_year, next_year))
    folder.prepare()
    assert not old.exists()
    assert not of_next_year.exists()
    assert young.exists()
    assert keys(folder) == []


COUNT_UP = """
import sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/contract"]
from shared.adapters.folder.store import FolderObjectStore
from object_stores import count_up
count_up(FolderObjectStore(Path(sys.argv[1])), 50)
"""


def test_folder_loses_no_replacement_between_processes(
    folder: FolderObjectStore, tmp_path: Path
) -> None:
    folder.create("counter", b"0", TEXT)
    with (
        child(COUNT_UP, str(tmp_path / "bucket")) as one,
        child(COUNT_UP, str(tmp_path / "bucket")) as two,
    ):
        assert (one.wait(60), two.wait(60)) == (0, 0)
    assert folder.get("counter").data == b"100"


def test_folder_puts_into_a_folder_that_is_being_removed(folder: FolderObjectStore) -> None:
    def putting(name: str) -> str:
        for _ in range(100):
            put(folder, f"a/b/{name}", b"x")
            folder.delete([f"a/b/{name}"])
        return "done"

    assert at_once([partial(putting, name) for name in "1234"]) == {"done": 4}


def test_folder_leaves_no_empty_folder_behind(folder: FolderObjectStore, tmp_path: Path) -> None:
    put(folder, "a/b/c", b"x")
    put(folder, "a/d", b"x")
    folder.delete(["a/b/c"])
    assert os.listdir(tmp_path / "bucket" / "a") == ["d"]
    put(folder, "a/e/f/g", b"x")
    folder.delete(["a/d", "a/e/f/g"])
    assert not (tmp_path / "bucket" / "a").exists()


def test_folder_refuses_a_key_below_an_object(folder: FolderObjectStore) -> None:
    put(folder, "a", b"x")
    with pytest.raises(StoreRefused, match="is a prefix of this one"):
        put(folder, "a/b/c", b"y")
    with pytest.raises(StoreRefused, match="is a prefix of this one"):
        put(folder, "a/b", b"y")


def test_folder_is_past_its_watermark_when_too_little_is_free(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    roomy, tight = (
        FolderObjectStore(tmp_path / "bucket", min_free_bytes=least) for least in (0, free * 2)
    )
    for store in (roomy, tight):
        store.prepare()

    roomy.check_room()
    with pytest.raises(StoreFull, match=f"STOWGATE_MIN_FREE_BYTES, which is {free * 2}"):
        tight.check_room()


def test_folder_on_a_full_disk_is_store_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mebibytes=4) as disk:
        store = FolderObjectStore(disk / "bucket", min_free_bytes=MIB)
        store.prepare()
        put(store, "first", bytes(3 * MIB))
        with pytest.raises(StoreFull, match="free some space"):
            put(store, "second", bytes(2 * MIB))
        with pytest.raises(StoreFull):
            store.create("third", bytes(2 * MIB), TEXT)
        assert keys(store) == ["first"]
        assert os.listdir(disk / "bucket" / ".tmp") == []
        store.check_room()
        put(store, "fourth", bytes(MIB // 2))
        with pytest.raises(StoreFull):
            store.check_room()


def test_folder_passes_on_the_failure_of_a_stream(
    folder: FolderObjectStore,
) -> None:
    class NoSpace(RawIOBase):
        def read(self, _size: int = -1) -> bytes:
            raise OSError(errno.ENOSPC, "the spool is full")

    with pytest.raises(OSError, match="the spool is full"):
        folder.put("key", cast("BinaryIO", NoSpace()), 5, TEXT)

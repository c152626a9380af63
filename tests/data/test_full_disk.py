"""Disks that are really full: small file systems in memory, mounted where nobody else sees them. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import caption, picture

_TRIAL = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]


def _may_mount() -> bool:
    try:
        return subprocess.run(_TRIAL, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


pytestmark = pytest.mark.skipif(not _may_mount(), reason="file systems may not be mounted here")


def on_small_disk(script: str, folder: Path, size: str) -> str:
    """What a script prints that runs with a file system of this size at a folder."""
    mount = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", size, str(folder), sys.executable, "-c", script]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(Path.cwd()), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CACHE = """
import sys
from pathlib import Path
from servers import ShardServer
from clip_train.data.cache import Cache
from clip_train.data.remote import look_up
from clip_train.errors import DataError

folder = Path({folder!r})
cache = Cache(folder)
with ShardServer() as server:
    server.files = {{f"{{n}}.tar": bytes([n]) * 40_000 for n in range(4)}} | {{"big.tar": bytes(200_000)}}
    for n in (0, 1, 2, 3, 0):
        url = server.url(f"{{n}}.tar")
        with cache.opened(url, look_up(url, cache.transfer), lambda path: None):
            print(sorted(path.name.partition("-")[2] for path in folder.glob("*-*")))
    url = server.url("big.tar")
    try:
        with cache.opened(url, look_up(url, cache.transfer), lambda path: None):
            print("no")
    except DataError as error:
        print(error)
    print([path.name for path in folder.glob("*-*")])
"""


def test_a_full_disk_under_the_cache(tmp_path: Path) -> None:
    """What was read longest ago makes room; a shard that the empty disk cannot hold stops, and leaves nothing."""
    lines = on_small_disk(CACHE.format(folder=str(tmp_path)), tmp_path, "100k").splitlines()
    assert lines[:5] == [str(held) for held in (["0.tar"], ["0.tar", "1.tar"], ["1.tar", "2.tar"],
                                                ["2.tar", "3.tar"], ["0.tar", "3.tar"])]  # fmt: skip
    assert "is full, and nothing in it can go (No space left on device)" in lines[5]
    assert "data.cache_dir" in lines[5]
    assert lines[6] == "[]"


SHM = """
import torch
from clip_train.data.loader import Loader
from clip_train.errors import DataError

class Large:
    def __getitem__(self, number):
        return torch.ones(1 << 20)

try:
    print(len(list(Loader(Large(), range(8), workers=1, prefetch=4))))
except DataError as error:
    print(error)
"""


def test_shared_memory_that_fills_up(tmp_path: Path) -> None:
    """4 MiB a batch into 2 MiB: torch would drop the batch and wait for it for ever."""
    assert "/dev/shm is full" in on_small_disk(SHM, Path("/dev/shm"), "2m")
    assert on_small_disk(SHM, Path("/dev/shm"), "100m").split() == ["8"]


PACK = """
import sys
from clip_train.cli import main
print(main(["data", "pack", {source!r}, {out!r}, "--per-shard", "8", "--workers", "{workers}"]))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_onto_a_full_disk(tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "disk"
    source.mkdir()
    out.mkdir()
    for number in range(32):
        (source / f"{number}.png").write_bytes(picture(number))
        (source / f"{number}.txt").write_text(caption(number))
    code = PACK.format(source=str(source), out=str(out / "packed"), workers=workers)
    script = code.replace("print(main", "sys.stderr = sys.stdout\nprint(main")
    found = on_small_disk(script, out, "60k")  # 32 shards of 4 KB each would need 130 KB
    assert found.splitlines()[-1] == "2", found
    assert "cannot be written: No space left on device" in " ".join(found.split())

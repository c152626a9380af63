"""Shards that a shell command writes to its standard output: `pipe:aws s3 cp s3://bucket/a.tar -`.

As webdataset's `pipe:`, but a command that fails at its end, or is silent for too long, is found out: webdataset's
`gopen` passes over exit status 141 (a reader that left early) and waits for ever.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import IO

from clip_train.data.transfer import PIPE, Found, Sink, Temporary, Transfer, changed
from clip_train.errors import DataError

_BLOCK = 1 << 20
_NOT_RUNNABLE = (126, 127)


def look_up(shard: str, transfer: Transfer) -> Found:
    """A command says nothing before it runs."""
    return Found(None, "")


def read(shard: str, transfer: Transfer) -> bytes:
    """There is nothing beside a command."""
    raise NotImplementedError


def fetch(shard: str, sink: Sink, expected: Found, transfer: Transfer) -> None:
    """Run the command once, from the beginning."""
    sink.restart()
    with tempfile.TemporaryFile() as complaints:
        status = _run(shard.removeprefix(PIPE), sink, complaints, 4 * transfer.timeout)
        said = _tail(complaints)
    if status in _NOT_RUNNABLE:
        raise DataError(f"{shard}: the command cannot be run (status {status}){said}")
    if status is None:
        raise Temporary(f"the command was silent for {4 * transfer.timeout:g} s{said}")
    if status:
        raise Temporary(f"the command ended with status {status}{said}")
    now = Found(sink.done, "")
    if not expected.agrees(now):
        raise changed(shard, expected, now)


def _run(command: str, sink: Sink, complaints: IO[bytes], silence: float) -> int | None:
    """The exit status, or None where nothing came for `silence` seconds."""
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=complaints,
        start_new_session=True,  # so that it can be ended with all that it started
    )
    assert process.stdout is not None
    try:
        while select.select([process.stdout], [], [], silence)[0]:
            if not (data := os.read(process.stdout.fileno(), _BLOCK)):
                return process.wait(timeout=silence)
            sink.write(data)
        return None
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:  # not waited for, so that its number is still its own
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def _tail(complaints: IO[bytes]) -> str:
    """The end of what the command wrote to its standard error."""
    complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 500))
    said = complaints.read().decode("utf-8", "replace").strip()
    return f": {said}" if said else ""

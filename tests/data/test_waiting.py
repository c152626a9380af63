from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import ShardServer

from clip_train.data.waiting import SlowNotice, side_by_side


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_side_by_side_keeps_the_order_and_the_first_error(threads: int) -> None:
    def inverse(number: int) -> float:
        time.sleep(0.01 * (5 - number) * (threads > 1))  # the later ones are done first
        return 1 / (number - 3)

    assert list(side_by_side(inverse, range(3), threads)) == [-1 / 3, -1 / 2, -1]
    found = side_by_side(inverse, range(100), threads)
    assert [next(found) for _ in range(3)] == [-1 / 3, -1 / 2, -1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_a_long_wait_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    notice = SlowNotice(after=0.1)
    with notice.waiting_for("quick"):
        pass
    began = time.monotonic()
    with notice.waiting_for("item 7"):
        time.sleep(0.9)
    waited = time.monotonic() - began
    notice.close()
    lines = capfd.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 1 + math.log2(waited / 0.1)  # after 0.1, 0.2, 0.4, 0.8 s, not each time it looks
    assert all(line.startswith("still waiting for item 7 after") for line in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_a_server_hangs(tmp_path: Path, number: int) -> None:
    """The look-ups would go on for minutes; the command ends now."""
    with ShardServer() as server:
        server.always = "hang"
        process = subprocess.Popen(
            [sys.executable, "-m", "clip_train", "data", "inspect", server.url("{0..9}.tar"), "--workers", "0"],
            stderr=subprocess.PIPE,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            # Under nohup and in a shell's background SIGINT is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        until = time.monotonic() + 60
        while not server.requests and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        assert server.requests, process.stderr
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
        assert b"Traceback" not in error

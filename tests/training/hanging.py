"""`clip-train` whose third batch never comes."""

from __future__ import annotations

import sys
import time

from clip_train.cli import main
from clip_train.data.batch import Batch
from clip_train.data.stream import Stream

get = Stream.__getitem__


def hang(self: Stream, step: int) -> Batch:
    if step == 2:
        time.sleep(3600)
    return get(self, step)


if __name__ == "__main__":
    Stream.__getitem__ = hang  # type: ignore[method-assign]
    sys.exit(main())

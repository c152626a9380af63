"""`python -m clip_train`, as torchrun starts it."""

import sys

from clip_train.cli import main

if __name__ == "__main__":
    sys.exit(main())

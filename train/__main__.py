"""``python -m interloom.train …`` is ``interloom train …``, for torchrun and srun."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

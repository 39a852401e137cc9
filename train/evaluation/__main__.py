"""``python -m interloom.train.evaluation …`` is ``interloom eval …``, for torchrun and srun."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))

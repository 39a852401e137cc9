"""``python -m interloom.train …`` is ``interloom train …``, for torchrun and srun."""

import sys

from .cli import main
from .loopback import end_with_agent

if __name__ == "__main__":
    end_with_agent()
    sys.exit(main(["train", *sys.argv[1:]]))

"""``python -m interloom.train.evaluation …`` is ``interloom eval …``, for torchrun and srun."""

import sys

from ..parallel.early_signals import heed_early_signals
from ..parallel.loopback import end_with_agent

if __name__ == "__main__":
    heed_early_signals()
    end_with_agent()
    from ..cli import main

    sys.exit(main(["eval", *sys.argv[1:]]))

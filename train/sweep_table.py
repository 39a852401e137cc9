"""``python -m interloom.train.sweep_table RUNS``: the scores of a sweep as a table."""

from .commands.sweep_table import main

if __name__ == "__main__":
    raise SystemExit(main())

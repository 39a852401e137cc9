"""What a checkpoint holds beside the weights."""

from __future__ import annotations

STATE_KEY = "interloom"


FORMAT = 1

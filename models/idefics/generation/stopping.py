"""When generation ends, and how it is watched while it runs.

Legend: R rows, T tokens so far.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# (ids [R, T], scores of the steps so far or None) -> bool [R], or one bool for all.
Criterion = Callable[[Tensor, Any], Any]


class Streamer(Protocol):
    """What ``generate(streamer=…)`` calls: ``put`` with the prompt, then with each new token; ``end`` at the
    end.
    """

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class TextStreamer:
    """Writes text as it comes, as far as it can no longer change.

    Args:
        tokenizer: anything with ``decode(ids, skip_special_tokens=…)``.
        write: takes each new piece; standard output by default.
        skip_prompt: leave the prompt out.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], object] | None = None,
        *,
        skip_prompt: bool = True,
        skip_special_tokens: bool = True,
    ) -> None:
        self.tokenizer, self.write = tokenizer, write or _write_out
        self.skip_special_tokens = skip_special_tokens
        self._prompt_due = skip_prompt
        self._ids: list[int] = []
        self._written = 0

    def put(self, value: Tensor) -> None:
        if value.dim() > 1 and value.shape[0] > 1:
            raise ValueError(f"TextStreamer was given {value.shape[0]} rows; stream one prompt at a time.")
        if self._prompt_due:
            self._prompt_due = False
            return
        self._ids.extend(value.flatten().tolist())
        text = self._text()
        # A character of several bytes is shown as a replacement mark until its last byte is there.
        if not text.endswith("\ufffd"):
            self._flush(text)

    def end(self) -> None:
        self._flush(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=self.skip_special_tokens)

    def _flush(self, text: str) -> None:
        if len(text) > self._written:
            self.write(text[self._written :])
            self._written = len(text)


def _write_out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Stopper:
    """Which rows are finished by their last token.

    Args:
        eos: ids that end a sequence.
        stop_strings: texts that end it once the continuation holds them.
        tokenizer: needed to read the continuation.
        prompt_length: tokens of the prompt, in which nothing is looked for.
        criteria: further ones.
        max_time: seconds from now after which every row is done.

    Raises:
        ValueError: there are stop strings but no tokenizer, or an empty one among them.
    """

    def __init__(
        self,
        eos: Sequence[int],
        stop_strings: Sequence[str],
        tokenizer: Any,
        prompt_length: int,
        *,
        criteria: Sequence[Criterion] = (),
        max_time: float | None = None,
    ) -> None:
        if stop_strings and tokenizer is None:
            raise ValueError("stop_strings need tokenizer=…, to read what has been generated.")
        if any(not text for text in stop_strings):
            raise ValueError("stop_strings holds an empty text; give texts of at least one character.")
        self.criteria = list(criteria)
        self.until = None if max_time is None else time.monotonic() + max_time
        self.eos = torch.tensor(list(eos), dtype=torch.long)
        self.stop_strings, self.tokenizer, self.prompt_length = list(stop_strings), tokenizer, prompt_length
        # A character takes at most four tokens (its bytes), and only a match with the newest token is new.
        self.window = 4 * max((len(text) for text in stop_strings), default=0) + 4

    def __call__(self, ids: Tensor, scores: Any = None) -> Tensor:
        """bool [R] for ids [R, T]; ``scores`` of the steps so far, where they are kept."""
        last = ids[:, -1]
        stopped = torch.zeros_like(last, dtype=torch.bool)
        if len(self.eos):
            stopped = torch.isin(last, self.eos.to(last.device))
        if self.stop_strings:
            begin = max(self.prompt_length, ids.shape[1] - self.window)
            texts = [self.tokenizer.decode(row, skip_special_tokens=False) for row in ids[:, begin:].tolist()]
            found = [any(stop in text for stop in self.stop_strings) for text in texts]
            stopped = stopped | torch.tensor(found, device=last.device)
        for criterion in self.criteria:
            done = criterion(ids, None if scores is None else tuple(scores))
            stopped = stopped | torch.as_tensor(done, dtype=torch.bool, device=last.device)
        if self.until is not None and time.monotonic() > self.until:
            stopped = torch.ones_like(stopped)
        return stopped

"""Lines to the user. What others named (files, weights, columns, words of a vocabulary, answers) is shown, not obeyed.

A terminal takes control characters for commands: a file's name could clear the screen, change what stands there or
fill the clipboard. So whatever is printed goes through :func:`visible`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import unicodedata
from typing import Any

# Control, format (marks that turn the direction of writing, invisible ones), surrogates, line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # of words in many scripts, and of pictures; harmless
# ``user:password@`` of an address, and the values of its query that open what it names.
_CREDENTIALS = re.compile(r"(://)[^/\s'\"]*@")
_SIGNED = re.compile(
    r"([?&][^=&\s'\"]*(?:sig|token|key|secret|credential|password)[^=&\s'\"]*=)[^&\s'\"]+", re.IGNORECASE
)


def visible(text: object, keep: str = "\n\t") -> str:
    """``text`` with every character a terminal would obey, or not show, written as its escape.

    Args:
        text: anything; ``str`` of it is taken.
        keep: control characters that stay.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c
        if c in keep or c in _JOINERS or unicodedata.category(c) not in _HIDDEN
        else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


def without_secrets(text: str) -> str:
    """``text`` whose addresses have neither passwords nor signatures, for what is stored and shown."""
    return _SIGNED.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))


class OutsideFault(RuntimeError):
    """What neither the user nor this program did and what may pass: a server away, a process killed.

    One sentence, and exit code 1: a scheduler is to start the run again, a few times.
    """


def tell(message: str) -> None:
    """Print a line on stderr.

    Where even that finds the disk full (the log may lie on it), training is not to end for it.
    """
    with contextlib.suppress(OSError):
        print(_writable(message, sys.stderr), file=sys.stderr, flush=True)


def show(text: object = "", *, end: str = "\n") -> None:
    """Print a result on stdout."""
    print(_writable(text, sys.stdout), end=end, flush=True)


def _writable(text: object, stream: Any) -> str:
    """What ``stream`` can encode of the visible ``text``."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return visible(without_secrets(str(text))).encode(encoding, "backslashreplace").decode(encoding)


def console(**options: Any) -> Any:
    """A ``rich.console.Console`` whose tables and lines are :func:`visible`."""
    from rich.console import Console
    from rich.segment import Segment

    class Visible(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                yield (segment if segment.control else Segment(visible(segment.text), segment.style, None))

    return Visible(**options)


def warn_visibly() -> None:
    """Let Python's warnings quote names as :func:`visible` too; for a program's own process."""
    import warnings

    plain = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **options: visible(plain(*arguments, **options))

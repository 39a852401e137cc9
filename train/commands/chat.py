"""``interloom generate --chat``: a dialogue, at a terminal or of lines that are piped in."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..messages import tell

IMAGE_MARK = "<image>"
_HELP = "Each line is a turn; /image FILE shows a picture with the next one, /new begins anew, /end or Ctrl-D ends."


def converse(
    processor: Any,
    write: Callable[[Any], tuple[list[int], str]],
    prompt: str,
    pictures: list[Any],
    system: str,
    image_attention: str,
) -> list[dict[str, str]]:
    """Hold a dialogue until the input ends.

    Args:
        processor: of the model.
        write: takes model inputs, shows the answer and returns its tokens and text.
        prompt: the first turn, if it says anything.
        pictures: for the ``<image>`` marks of the turns, in order; without marks the first turn shows them all.
        system: what the model is told before.
        image_attention: as in the processor.

    Returns:
        ``user`` and ``assistant`` of every turn.

    Raises:
        ValueError: there is no turn, a mark without a picture, or the model's template cannot be used.
    """
    before = [{"role": "system", "content": clean(processor, system)}] if system.strip() else []
    if before and processor.chat.system_left_out:
        raise ValueError(f"--system cannot be used: {processor.chat.system_left_out}.")
    messages: list[dict[str, Any]] = list(before)
    waiting = list(pictures)
    turns: list[dict[str, str]] = []
    for line, alone in _lines(prompt):
        if alone and line.split(" ")[0] in ("/image", "/new", "/end"):
            command, _, rest = line.partition(" ")
            if command == "/end":
                break
            if command == "/new":
                messages, waiting = list(before), []
            else:
                try:
                    waiting.append(picture(rest.strip()))
                except ValueError as error:
                    tell(str(error))
            continue
        try:
            content = turn(processor, line, waiting)
        except ValueError as error:
            if not alone:
                raise
            tell(str(error))
            continue
        messages.append({"role": "user", "content": content})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, image_attention=image_attention
        )
        _, text = write(inputs)
        messages.append({"role": "assistant", "content": text.strip()})
        turns.append({"user": line, "assistant": text.strip()})
    if not turns and not sys.stdin.isatty():
        raise ValueError("There is no turn; give --prompt, or lines on the standard input.")
    if waiting:
        tell(
            f"{len(waiting)} pictures were given and no turn showed them; mark their places with {IMAGE_MARK}."
        )
    return turns


def turn(processor: Any, line: str, waiting: list[Any]) -> list[dict[str, Any]]:
    """What a user says, as parts; takes the pictures that it shows out of ``waiting``.

    Raises:
        ValueError: more marks than pictures.
    """
    pieces = line.split(IMAGE_MARK)
    if len(pieces) - 1 > len(waiting):
        raise ValueError(
            f"The turn holds {len(pieces) - 1} {IMAGE_MARK} but {len(waiting)} pictures are left; give one --image "
            "for each."
        )
    shown = len(waiting) if len(pieces) == 1 else 0
    parts: list[dict[str, Any]] = [{"type": "image", "image": waiting.pop(0)} for _ in range(shown)]
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image", "image": waiting.pop(0)})
        if text := clean(processor, piece):
            parts.append({"type": "text", "text": text})
    return parts


def clean(processor: Any, text: str) -> str:
    """A text without special tokens: nobody ends a turn, or shows a picture, by writing of it."""
    added = processor.tokenizer.backend.get_added_tokens_decoder().values()
    special = sorted({str(token.content) for token in added if token.special}, key=len, reverse=True)
    found = 1
    while found and special:
        text, found = re.subn("|".join(map(re.escape, special)), "", text)
    return text


def turn_ends(processor: Any) -> list[int]:
    """The token with which the model's template ends an answer, if it is one."""
    end = processor.chat.turn_end()
    row = processor.tokenizer.rows([end])[0] if end else []
    added = processor.tokenizer.backend.get_added_tokens_decoder()
    return [row[0]] if row and row[0] in added else []


def picture(name: str) -> Any:
    """A web address as it is, a path as a path.

    Raises:
        ValueError: there is no such file.
    """
    if "://" in name:
        return name
    if not Path(name).exists():
        raise ValueError(f"--image {name} does not exist; give the path of an image or a web address.")
    return Path(name)


def _lines(prompt: str) -> Iterator[tuple[str, bool]]:
    """Each turn, and whether a person typed it, who can try again."""
    if prompt.strip():
        yield prompt, False
    if not sys.stdin.isatty():
        yield from ((line.strip(), False) for line in sys.stdin if line.strip())
        return
    tell(_HELP)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line.strip(), True

"""How texts and pictures in reading order are written as one text: the processor's prompts and training documents.

A picture is ``<fake_token_around_image><image><fake_token_around_image>``; two that stand side by side share the
token between them. Texts lose the blanks at their ends, nothing else: a newline beside a picture stays, and nothing
is put between two texts but ``<end_of_utterance>``, where the tokenizer has it.
"""

from __future__ import annotations

from collections.abc import Iterable

FAKE_TOKEN = "<fake_token_around_image>"
IMAGE_TOKEN = "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"


def write_prompt(parts: Iterable[str | None], begin: str, end: str = "", *, utterances: bool = False) -> str:
    """One text of a prompt.

    Args:
        parts: texts, and None for each picture.
        begin, end: tokens around it all.
        utterances: put ``<end_of_utterance>`` between two texts that follow each other.
    """
    written, last = [begin], ""
    for part in parts:
        if part is None:
            written.append((IMAGE_TOKEN if last == "image" else FAKE_TOKEN + IMAGE_TOKEN) + FAKE_TOKEN)
            last = "image"
            continue
        if utterances and last == "text":
            written.append(END_OF_UTTERANCE)
        written.append(part.strip(" "))
        last = "text"
    return "".join(written) + end

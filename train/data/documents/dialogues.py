"""Dialogues as token ids: written by the chat template, with the places of the assistant's words."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ....models.idefics.chat import ChatTemplate, tokens_of
from ....models.received import read_settings
from ....models.tokenizer import chat_template
from ..report import BadSample, SkipReport
from .records import Document, Picture
from .tokenization import DocumentTokenizer


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Attributes:
        ids: its tokens.
        starts: position of each image's opening token.
        answers: tokens ``start:end`` of the assistant's words; of a page None.
    """

    ids: list[int]
    starts: list[int]
    answers: list[tuple[int, int]] | None = None


class DialogueWriter:
    """Writes dialogues with the chat template of a tokenizer's folder.

    Raises:
        ValueError: there is none that can be used.
    """

    def __init__(self, tokenizer: DocumentTokenizer) -> None:
        self.tokenizer = tokenizer
        folder = Path(tokenizer.path)
        folder = folder.parent if folder.suffix == ".json" else folder
        settings = _settings(folder)
        self.template = ChatTemplate.of(settings, tokenizer.backend, tokenizer.special_names, str(folder))
        self.digest = sha256(str(settings.get("chat_template")).encode()).hexdigest()

    def encode(self, document: Document, report: SkipReport | None = None) -> Encoded:
        """Tokens of a dialogue.

        Raises:
            BadSample: the template refuses it or drops part of it.
        """
        messages = self._messages(document, report)
        if self.template.system_left_out and any(message["role"] == "system" for message in messages):
            raise BadSample(
                "chat template leaves out the system's words",
                document.key,
                self.template.system_left_out[:160],
            )
        try:
            written = self.template.write(messages)
        except ValueError as error:
            raise BadSample("chat template refuses the dialogue", document.key, str(error)[:200]) from None
        ids, offsets = self.tokenizer.encode_offsets(written.text)
        starts = self.tokenizer.image_starts(ids)
        shown = len(document.pictures)
        if len(starts) != shown:
            raise BadSample(
                "chat template writes other pictures", document.key, f"{len(starts)}, expected {shown}"
            )
        turns = [turn for turn in document.turns if turn.role == "assistant"]
        answers = written.answers
        if not all(turn.learn for turn in turns):
            if len(turns) != len(answers):
                raise BadSample("answers that are not to be learnt cannot be told apart", document.key)
            answers = [span for turn, span in zip(turns, answers, strict=True) if turn.learn]
        spans = tokens_of(offsets, answers)
        if not spans:
            raise BadSample("conversation without an answer to learn", document.key)
        return Encoded(ids, starts, spans)

    def _messages(self, document: Document, report: SkipReport | None) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": []} for turn in document.turns]
        for part, place in zip(document.parts, document.places, strict=True):
            content = messages[place]["content"]
            if isinstance(part, Picture):
                content.append({"type": "image"})
                continue
            # What stands side by side is one text: a special token must not come about between two.
            joined = content.pop()["text"] if content and content[-1]["type"] == "text" else ""
            text = self.tokenizer.without_special(joined + part, document.key, report)
            content.append({"type": "text", "text": text})
        for number, message in enumerate(messages):
            if not any(part["type"] == "image" or part["text"].strip() for part in message["content"]):
                raise BadSample("turn that says nothing", document.key, f"{message['role']}, turn {number}")
        return messages


def _settings(folder: Path) -> Mapping[str, Any]:
    """What the folder's files say about dialogues."""
    settings: dict[str, Any] = {}
    with suppress(ValueError):  # a tokenizer without further files
        settings.update(read_settings(folder / "tokenizer_config.json"))

    def find(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return settings | chat_template(find)

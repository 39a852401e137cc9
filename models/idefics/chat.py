"""Dialogues as text: the tokenizer's chat template, or that of IDEFICS-instruct, and which words are the assistant's.

A turn is ``{"role": "system" | "user" | "assistant", "content": [{"type": "text", "text": …} | {"type": "image"}]}``.
A picture becomes ``<fake_token_around_image><image><fake_token_around_image>``, neighbours share the token between
them, whether the template writes all three or ``<image>`` alone.

The assistant's words are what the template marks with ``{% generation %}``. Of a template that marks nothing they are
what an answer adds to the prompt before it, up to the token that ends the turn.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..received_template import ReceivedTemplate
from .prompt import END_OF_UTTERANCE, FAKE_TOKEN, IMAGE_TOKEN

# As the model card of idefics-9b-instruct writes its prompts.
INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}:"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for part in message['content'] %} {{ part['text'] | trim }}{% endfor %}<end_of_utterance>"
    "{% endgeneration %}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{% if loop.first %} {% endif %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_utterance>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}{{ '\\n' }}{% endif %}Assistant:{% endif %}"
)
_PICTURES = re.compile(f"(?:(?:{FAKE_TOKEN})*{IMAGE_TOKEN}(?:{FAKE_TOKEN})*)+")
_MOST_TURNS = 1000
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """A dialogue as text.

    Attributes:
        text: special tokens included.
        answers: characters ``start:end`` of the assistant's words, in order.
    """

    text: str
    answers: list[tuple[int, int]]


class ChatTemplate:
    """How a model's dialogues are written.

    Args:
        template: Jinja; None takes IDEFICS-instruct's.
        tokens: ``bos_token``, ``eos_token`` and their like, as the template names them.
        name: of the tokenizer, for messages.

    Raises:
        ValueError: the template cannot be read, or leaves out pictures, questions or answers.
    """

    def __init__(self, template: str | None, tokens: Mapping[str, str], name: str) -> None:
        self.name, self.own = name, template is not None
        self._tokens = dict(tokens)
        self._template = ReceivedTemplate(INSTRUCT_TEMPLATE if template is None else template, name)
        self._as_parts = self._takes_parts()
        self.system_left_out = self._probe()

    @classmethod
    def of(cls, settings: Mapping[str, Any], vocabulary: Any, tokens: Mapping[str, str], name: str) -> Self:
        """The template of a tokenizer.

        Args:
            settings: of ``tokenizer_config.json``; ``chat_template`` there is one, or a list of named ones.
            vocabulary: has ``token_to_id``.
            tokens, name: as in the class.

        Raises:
            ValueError: there is none, and no ``<end_of_utterance>`` for the other; or as the class.
        """
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
            template = named.get("default") or next(iter(named.values()), None)
        elif isinstance(template, Mapping):
            template = template.get("default") or next(iter(template.values()), None)
        if isinstance(template, str) and template.strip():
            return cls(template, tokens, name)
        if vocabulary.token_to_id(END_OF_UTTERANCE) is None:
            raise ValueError(
                f"the tokenizer at {name} has neither a chat template nor the token {END_OF_UTTERANCE}; add one of "
                "them (chat_template.jinja, or add_special_tokens and save_pretrained), or use the tokenizer of a "
                "model that speaks in turns."
            )
        return cls(None, tokens, name)

    def write(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Written:
        """A dialogue as text.

        Raises:
            ValueError: the template refuses the dialogue or drops part of it, or which words are the assistant's
                cannot be told.
        """
        if len(messages) > _MOST_TURNS:
            raise ValueError(f"a dialogue has {len(messages)} turns, expected at most {_MOST_TURNS}.")
        text, marked = self._render(messages, add_generation_prompt)
        self._check_complete(messages, text)
        if self._template.marks_answers:
            answers = marked
        else:
            answers = [
                self._answer(messages, n, text) for n, m in enumerate(messages) if m["role"] == "assistant"
            ]
        return _with_pictures(text, answers)

    def turn_end(self) -> str:
        """What the template writes after an answer: how a model says that it is done."""
        messages = [_turn("user", "question"), _turn("assistant", "answer")]
        return self._render(messages, False)[0].rpartition("answer")[2].strip()

    def _render(self, messages: Sequence[Message], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        given = [{"role": m["role"], "content": self._content(m["content"])} for m in messages]
        return self._template.render(given, add_generation_prompt=prompt, **self._tokens)

    def _content(self, parts: Sequence[Mapping[str, Any]]) -> Any:
        if self._as_parts:
            return [dict(part) for part in parts]
        return "".join(IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in parts)

    def _takes_parts(self) -> bool:
        """Whether the template takes lists of parts; else texts, in which pictures are written out.

        Raises:
            ValueError: it writes pictures in neither way.
        """
        shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}]
        why = ""
        for self._as_parts in (True, False):
            try:
                text, _ = self._render(shown, False)
            except ValueError as error:
                why = f" ({error})"
                continue
            if text.count(IMAGE_TOKEN) == 1 and "probe" in text and "'type'" not in text:
                return self._as_parts
        raise ValueError(
            f"the chat template of {self.name} leaves out a user's picture or words, expected {IMAGE_TOKEN} where one "
            f"is shown{why}; mend the template."
        )

    def _probe(self) -> str:
        """Why a system turn is not written; nothing if it is.

        Raises:
            ValueError: an answer is left out.
        """
        spoken = [_turn("user", "probe of users"), _turn("assistant", "probe of assistants")]
        self._check_complete(spoken, self._render(spoken, False)[0])
        told = [_turn("system", "probe of systems"), *spoken]
        try:
            self._check_complete(told, self._render(told, False)[0])
        except ValueError as error:
            return str(error)
        return ""

    def _check_complete(self, messages: Sequence[Message], text: str) -> None:
        """Refuse a template that drops a turn."""
        wanted: Counter[tuple[str, str]] = Counter()
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text" and part["text"].strip():
                    wanted[message["role"], part["text"].strip()] += 1
        for (role, words), count in wanted.items():
            if text.count(words) < count:
                raise ValueError(f"the chat template of {self.name} leaves out the {role}'s words")
        pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
        if text.count(IMAGE_TOKEN) != pictures:
            raise ValueError(
                f"the chat template of {self.name} writes {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} for "
                f"{pictures} pictures"
            )

    def _answer(self, messages: Sequence[Message], number: int, whole: str) -> tuple[int, int]:
        """Where one answer of a template without marks stands in the whole text.

        Raises:
            ValueError: the template writes turns anew when others follow, and the words are not found.
        """
        words = "".join(
            part["text"] for part in messages[number]["content"] if part["type"] == "text"
        ).strip()
        bare, before = (self._render(messages[:number], prompt)[0] for prompt in (False, True))
        after = self._render(messages[: number + 1], False)[0]
        turn_ends = len(after) if whole.startswith(after) else len(whole)
        if before != bare and whole.startswith(before):
            start = len(before)
            found = whole.find(words, start, turn_ends)
        else:  # a template that has no beginning of an answer, or one that it does not keep
            shared = next((n for n, (a, b) in enumerate(zip(bare, whole, strict=False)) if a != b), len(bare))
            start = found = whole.rfind(words, min(shared, turn_ends), turn_ends)
        if found < 0:
            raise ValueError(
                f"in the text of the chat template of {self.name} an answer cannot be told apart"
            )
        end = found + len(words)
        tail = whole[end:turn_ends] if whole.startswith(after) else ""
        # The line break after the token that ends a turn belongs to nobody; alone it is what ends the turn.
        return start, end + (len(tail.rstrip()) or len(tail))


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _with_pictures(text: str, answers: Iterable[tuple[int, int]]) -> Written:
    """The text with its pictures written in full, and its answers where they then stand."""
    pieces: list[str] = []
    ends, moves = [0], [0]
    last = 0
    for found in _PICTURES.finditer(text):
        count = found.group().count(IMAGE_TOKEN)
        full = FAKE_TOKEN + (IMAGE_TOKEN + FAKE_TOKEN) * count
        pieces += [text[last : found.start()], full]
        last = found.end()
        ends.append(last)
        moves.append(moves[-1] + len(full) - len(found.group()))
    pieces.append(text[last:])

    def moved(position: int) -> int:
        return position + moves[bisect_right(ends, position) - 1]

    return Written("".join(pieces), [(moved(start), moved(end)) for start, end in answers])


def tokens_of(offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Tokens ``start:end`` that hold any character of each span.

    Args:
        offsets: characters ``start:end`` of each token, in order.
        spans: characters ``start:end``.
    """
    found = []
    for start, end in spans:
        inside = [
            n for n, (first, last) in enumerate(offsets) if first < last and first < end and last > start
        ]
        if inside:
            found.append((inside[0], inside[-1] + 1))
    return found

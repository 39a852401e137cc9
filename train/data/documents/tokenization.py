"""Documents as token ids, exactly as the IDEFICS processor would write the same prompt.

The processor's own function writes them (:mod:`~....models.idefics.prompt`), between the begin and the end token.
Special tokens that are *written* in a page are removed from its text: a web page must not be able to fake an image or
an end of document.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from ....models.idefics.prompt import END_OF_UTTERANCE, write_prompt
from ....models.idefics.prompt import FAKE_TOKEN as AROUND
from ....models.idefics.prompt import IMAGE_TOKEN as IMAGE
from ....models.received import read_bytes, read_settings
from ....models.tokenizer import without_begin
from ..report import SkipReport
from ..shards.made_by import how_to_make
from .records import Document, Picture


class DocumentTokenizer:
    """A ``tokenizers`` tokenizer with the four tokens that documents need.

    Args:
        directory: folder with ``tokenizer.json`` (or that file), and optionally ``tokenizer_config.json`` or
            ``special_tokens_map.json`` naming ``bos_token`` and ``eos_token`` (``<s>`` and ``</s>`` if not).

    Raises:
        FileNotFoundError: no ``tokenizer.json``.
        ValueError: a token is missing from the vocabulary.
    """

    def __init__(self, directory: str | Path) -> None:
        # Imported here: reading shards needs no tokenizer.
        from ....models.received_tokenizer import MAX_BYTES, is_plain, parse_tokenizer

        path = Path(directory)
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {file}; {how_to_make(file) or 'give a folder that holds tokenizer.json'}."
            )
        self.path = str(directory)
        blob = read_bytes(file, MAX_BYTES)
        # The identity of a tokenizer: shards made with another one are refused.
        self.sha256 = hashlib.sha256(blob).hexdigest()
        self.backend = parse_tokenizer(blob, file)
        self._plain = is_plain(self.backend)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_names = names = _special_names(file.parent)
        self._bos, self._eos = names.get("bos_token", "<s>"), names.get("eos_token", "</s>")
        self.bos_id = self._id(self._bos) if self._bos else None
        self.eos_id = self._id(self._eos)
        self.image_id, self.around_id = self._id(IMAGE), self._id(AROUND)
        pad = self.backend.token_to_id(names.get("pad_token", "<pad>"))
        self.pad_id = self.eos_id if pad is None else pad
        self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder().values()
        special = sorted({str(token.content) for token in added if token.special} | {IMAGE, AROUND})
        self._utterances = END_OF_UTTERANCE in _additional(file.parent)
        self._special = re.compile("|".join(re.escape(token) for token in special))

    def _id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise ValueError(
                f"the tokenizer at {self.path} has no token {token!r}; add it (IDEFICS needs {AROUND}, "
                f"{IMAGE}, a begin and an end token) or use a tokenizer made for IDEFICS"
            )
        return number

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text without begin and end."""
        from ....models.received_tokenizer import encode_batch

        (ids,) = encode_batch(self.backend, [text], plain=self._plain, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def encode(self, document: Document, report: SkipReport | None = None) -> tuple[list[int], list[int]]:
        """Return (ids, position of each image's opening token) of a document.

        A neighbour's opening token is the one it shares, so the positions of adjacent images are 2 apart.
        """
        parts: list[str | None] = []
        for part in document.parts:
            if isinstance(part, Picture):
                parts.append(None)
                continue
            parts.append(self.without_special(part, document.key, report))
        ids = self.encode_text(write_prompt(parts, self._bos, self._eos, utterances=self._utterances))
        return ids, self.image_starts(ids)

    def image_starts(self, ids: list[int]) -> list[int]:
        """Position of each image's opening token."""
        return [position - 1 for position, token in enumerate(ids) if token == self.image_id]

    def without_special(self, text: str, key: str, report: SkipReport | None) -> str:
        """A text without special tokens that are written in it, which are counted."""
        total, removed = 0, 1
        while removed:  # what is left may form one anew: <ima<image>ge>
            text, removed = self._special.subn("", text)
            total += removed
        if total and report is not None:
            report.note("special token in text removed", key, count=total)
        return text

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without begin and end, and the characters ``start:end`` of each."""
        from ....models.received_tokenizer import encodings

        (found,) = encodings(self.backend, [text], plain=self._plain, add_special_tokens=False)
        return found.ids, found.offsets


def _special_names(directory: Path) -> dict[str, str]:
    """Names of the special tokens, from whichever file holds them."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content = read_settings(directory / file)
        except ValueError:
            continue
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = content.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                names[key] = value
        names |= without_begin(content)
    return names


def _additional(directory: Path) -> list[str]:
    """Further special tokens, as the processor's tokenizer reads them."""
    settings: dict = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        with suppress(ValueError):
            settings.update(read_settings(directory / file))
    found = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if not isinstance(found, list):
        return []
    return [str(token.get("content") if isinstance(token, dict) else token) for token in found]

"""Documents as token ids, exactly as the IDEFICS processor would write the same prompt.

An image is ``<fake_token_around_image><image><fake_token_around_image>``; neighbours share the token between
them. A document opens with the begin token and closes with the end token. Special tokens that are *written*
in a page are removed from its text: a web page must not be able to fake an image or an end of document.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ....models.received import read_bytes, read_settings
from ..made_by import how_to_make
from ..report import SkipReport
from .records import Document, Picture

IMAGE, AROUND = "<image>", "<fake_token_around_image>"


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
        self._tokenizer = parse_tokenizer(blob, file)
        self._plain = is_plain(self._tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names = _special_names(file.parent)
        self.bos_id = self._id(names.get("bos_token", "<s>"))
        self.eos_id = self._id(names.get("eos_token", "</s>"))
        self.image_id, self.around_id = self._id(IMAGE), self._id(AROUND)
        pad = self._tokenizer.token_to_id(names.get("pad_token", "<pad>"))
        self.pad_id = self.eos_id if pad is None else pad
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = sorted({str(token.content) for token in added if token.special} | {IMAGE, AROUND})
        self._special = re.compile("|".join(re.escape(token) for token in special))

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(
                f"the tokenizer at {self.path} has no token {token!r}; add it (IDEFICS needs {AROUND}, "
                f"{IMAGE}, a begin and an end token) or use a tokenizer made for IDEFICS"
            )
        return number

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text without begin and end."""
        from ....models.received_tokenizer import encode_batch

        (ids,) = encode_batch(self._tokenizer, [text], plain=self._plain, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def encode(self, document: Document, report: SkipReport | None = None) -> tuple[list[int], list[int]]:
        """Return (ids, position of each image's opening token) of a document.

        A neighbour's opening token is the one it shares, so the positions of adjacent images are 2 apart.
        """
        prompt, open_image = "", False
        for part in document.parts:
            if isinstance(part, Picture):
                prompt += IMAGE + AROUND if open_image else AROUND + IMAGE + AROUND
                open_image = True
                continue
            text, removed = self._special.subn("", part)
            if removed and report is not None:
                report.add("special token in text removed", document.key, count=removed)
            text = text.strip()
            if text:
                # Texts that follow one another were paragraphs.
                prompt += text if open_image or not prompt else "\n\n" + text
                open_image = False
        ids = [self.bos_id, *self.encode_text(prompt), self.eos_id]
        starts = [position - 1 for position, token in enumerate(ids) if token == self.image_id]
        return ids, starts


def _special_names(directory: Path) -> dict[str, str]:
    """Names of the special tokens, from whichever file holds them."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content = read_settings(directory / file)
        except ValueError:
            continue
        for key in ("bos_token", "eos_token", "pad_token"):
            value = content.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                names[key] = value
    return names

"""Prompts of interleaved text and pictures to the tensors the model takes.

A picture becomes ``<fake_token_around_image><image><fake_token_around_image>`` in the text; two that stand
side by side share the fake token between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from .. import received
from ..checkpoint import CheckpointFolder, HubOptions
from ..inputs import BatchFeature, as_kind, check_return_tensors
from ..pictures import picture_suffix
from ..received import blaming
from ..tokenizer import ROLES, SETTINGS
from .chat import ChatTemplate
from .image_mask import image_attention_mask
from .image_processing import IdeficsImageProcessor, ImageInput, read_settings
from .prompt import END_OF_UTTERANCE, FAKE_TOKEN, IMAGE_TOKEN, write_prompt
from .tokenizer import IdeficsTokenizer

PROCESSOR_FILE = "processor_config.json"
# Longer strings name no file on any system.
_LONGEST_PATH = 4096

Fetch = Callable[[str], Image.Image]


class IdeficsProcessor:
    """Tokenizer and image preprocessing in one call.

    Args:
        image_processor: settings of the pictures.
        tokenizer: ``IdeficsTokenizer``, or one it can wrap (a fast tokenizer of Transformers).
        add_end_of_utterance_token: put ``<end_of_utterance>`` between two texts that follow each other; None
            does so if the tokenizer has it as a special token.
        fetch: opens a web address; without it addresses are refused, for fetching what a prompt names is a
            matter of trust. ``interloom.train.data.download`` has a guarded one.
    """

    def __init__(
        self,
        image_processor: IdeficsImageProcessor,
        tokenizer: Any,
        image_size: int | None = None,
        add_end_of_utterance_token: bool | None = None,
        *,
        fetch: Fetch | None = None,
    ) -> None:
        self.image_processor = image_processor
        if image_size is not None:
            self.image_processor.image_size = image_size
        self.tokenizer = IdeficsTokenizer.wrap(tokenizer)
        self.image_token_id = self.tokenizer.require(IMAGE_TOKEN)
        self.tokenizer.require(FAKE_TOKEN)
        self.add_end_of_utterance_token = add_end_of_utterance_token
        self.fetch = fetch
        self._chat: ChatTemplate | None = None

    def __call__(self, images: Any = None, text: Any = None, **settings: Any) -> BatchFeature:
        """Make model inputs of prompts.

        Args:
            images, text: as `encode` takes them.
            settings: the other arguments of `encode`. ``text_kwargs`` and ``images_kwargs`` are dictionaries of such,
                and ``common_kwargs`` one of what holds where nothing else is said.

        Raises:
            ValueError: as `encode`, or a setting is given twice.
        """
        settings = {**(settings.pop("common_kwargs", None) or {}), **settings}
        for group in ("text_kwargs", "images_kwargs"):
            given = settings.pop(group, None) or {}
            if twice := sorted(given.keys() & settings.keys()):
                raise ValueError(f"{', '.join(twice)} is given in {group} and beside it; give it once.")
            settings.update(given)
        return self.encode(images, text, **settings)

    def encode(
        self,
        images: Any = None,
        text: Any = None,
        *,
        padding: bool | str | None = None,
        padding_side: str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        transform: Callable[[Image.Image], Tensor] | None = None,
        add_eos_token: bool = False,
        add_end_of_utterance_token: bool | None = None,
        add_special_tokens: bool = False,
        image_attention: str = "latest",
        return_tensors: str | None = "pt",
        **image_settings: Any,
    ) -> BatchFeature:
        """Make model inputs.

        Args:
            images: prompts, if ``text`` is not given; else one picture, or a list of them, for each text,
                which stand after it (before it, if they are not in lists).
            text: one prompt, or several: a prompt is a list of texts and pictures in reading order. A
                picture is a Pillow image, an array, a tensor, a ``Path``, a string that is a web address, or
                a string that is the path of a picture file (`picture_path`).
            padding: True or ``"longest"``; ``"max_length"`` to ``max_length``; False. Where this, ``truncation`` or
                ``max_length`` is not given, the tokenizer's settings of that name say it, and else ``"longest"``.
            padding_side: the tokenizer's by default.
            truncation: cut to ``max_length`` tokens.
            transform: used on each picture instead of the image processor's steps.
            add_eos_token: end every prompt with the end-of-sequence token.
            image_attention: what a token sees: ``"latest"`` picture before it, or ``"all_previous"`` ones.
            return_tensors: ``"pt"``, ``"np"`` for arrays, or None for lists.
            image_settings: fields of the image processor, for this call alone.

        Returns:
            ``input_ids``, ``attention_mask`` [B, T], ``pixel_values`` [B, N, 3, S, S] (zeros where a prompt
            has fewer pictures than N) and ``image_attention_mask`` [B, T, N].

        Raises:
            ValueError: there is no prompt, something in it is neither text nor picture, an address is given
                without ``fetch``, a picture's path is not there, or prompts of unlike length are not padded.
        """
        check_return_tensors(return_tensors)
        prompts = _prompts(images, text)
        if add_end_of_utterance_token is None:
            add_end_of_utterance_token = self.add_end_of_utterance_token
        if add_end_of_utterance_token is None:
            add_end_of_utterance_token = END_OF_UTTERANCE in self.tokenizer.additional_special_tokens
        texts, pictures = [], []
        for prompt in prompts:
            written, shown = self._write(prompt, bool(add_end_of_utterance_token), add_eos_token)
            texts.append(written)
            pictures.append(shown)
        told = self.tokenizer.of_calls
        fill = told.get("padding", "longest") if padding is None else padding
        truncation = told.get("truncation", False) if truncation is None else truncation
        limit = max_length or told.get("max_length") or self.tokenizer.model_max_length
        cut = truncation not in (False, "do_not_truncate")
        rows = self.tokenizer.rows(
            texts, add_special_tokens=add_special_tokens, max_length=limit if cut else None
        )
        length = self.tokenizer.padded_length(rows, fill, limit, pad_to_multiple_of)
        ids, mask = (as_kind(x, "pt", "Prompts") for x in self.tokenizer.pad_rows(rows, length, padding_side))
        count = max(1, max(len(shown) for shown in pictures))
        pixels = self._pixels(rows, pictures, count, transform, self.image_processor.changed(image_settings))
        if any(pictures):
            seen = image_attention_mask(
                ids, self.image_token_id, self.tokenizer.eos_token_id, count, image_attention
            )
        else:
            seen = torch.zeros(*ids.shape, 1, dtype=torch.bool)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": pixels,
            "image_attention_mask": seen,
        }
        return BatchFeature({name: as_kind(value, return_tensors) for name, value in batch.items()})

    def _write(self, prompt: Sequence[Any], utterances: bool, eos: bool) -> tuple[str, list[ImageInput]]:
        """One prompt as text with image tokens, and its pictures."""
        parts, pictures = [], []
        for item in prompt:
            picture = self._picture(item)
            if picture is not None:
                pictures.append(picture)
            elif not isinstance(item, str):
                raise ValueError(
                    f"A prompt holds a {type(item).__name__}; give texts, Pillow images, arrays, tensors "
                    "and paths."
                )
            parts.append(item if picture is None else None)
        end = self.tokenizer.eos_token if eos else ""
        return write_prompt(parts, self.tokenizer.bos_token or "", end, utterances=utterances), pictures

    def _picture(self, item: Any) -> ImageInput | None:
        """The picture an item of a prompt stands for, or None if it is text."""
        if not isinstance(item, str):
            is_picture = isinstance(item, (Image.Image, os.PathLike)) or hasattr(item, "ndim")
            return item if is_picture else None
        word = item.strip(" ")
        address = urlsplit(word) if "://" in word and " " not in word and "\n" not in word else None
        if address is not None and address.scheme and address.netloc:
            if self.fetch is None:
                raise ValueError(
                    f"A prompt names the address {word} but this processor fetches nothing; download the "
                    "picture, or make the processor with fetch=… ."
                )
            return self.fetch(word)
        return picture_path(word)

    def _pixels(
        self,
        rows: list[list[int]],
        pictures: list[list[ImageInput]],
        count: int,
        transform: Callable[[Image.Image], Tensor] | None,
        steps: IdeficsImageProcessor,
    ) -> Tensor:
        """[B, N, 3, S, S]; pictures whose token was cut off are left out."""
        size, channels = steps.image_size, steps.image_num_channels
        pixels: Tensor | None = None
        for index, (row, shown) in enumerate(zip(rows, pictures, strict=True)):
            shown = shown[: min(row.count(self.image_token_id), count)]
            if not shown:
                continue
            encoded = steps(shown, transform=transform, return_tensors="pt")
            if pixels is None:
                pixels = torch.zeros(len(rows), count, *encoded.shape[1:])
            if encoded.shape[1:] != pixels.shape[2:]:
                raise ValueError(
                    f"transform made images of mixed sizes ({tuple(encoded.shape[1:])} and "
                    f"{tuple(pixels.shape[2:])}); make them one size."
                )
            pixels[index, : len(encoded)] = encoded
        return torch.zeros(len(rows), count, channels, size, size) if pixels is None else pixels

    def decode(self, ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """`IdeficsTokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens, **options)

    def batch_decode(self, ids: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """`IdeficsTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens, **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """Texts of what ``generate`` returned."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **options)

    @property
    def chat(self) -> ChatTemplate:
        """How dialogues are written: by the tokenizer's template, or IDEFICS-instruct's.

        Raises:
            ValueError: the tokenizer has neither, or a template that cannot be used.
        """
        if self._chat is None:
            text = self.tokenizer
            tokens = {name: getattr(text, name) for name in ROLES}
            self._chat = ChatTemplate.of(text.settings, text.backend, tokens, "the model's tokenizer")
        return self._chat

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        image_attention: str = "latest",
    ) -> Any:
        """A dialogue as its template writes it.

        Args:
            conversation: turns with ``role`` and ``content``: a text, or parts ``{"type": "text", "text": …}`` and
                ``{"type": "image", "image": …}`` with a picture as `encode` takes it.
            add_generation_prompt: end with what stands before an answer.
            tokenize: return model inputs of one row, as `encode` does, instead of the text.
            image_attention: as in `encode`; the tokens that end turns do not hide the pictures before them.

        Raises:
            ValueError: the template refuses the dialogue or leaves out part of it, or a part is neither.
        """
        messages, pictures = [], []
        for turn in conversation:
            content = turn["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            plain: list[dict[str, Any]] = []
            for part in parts:
                if part.get("type") == "image":
                    found = self._picture(part.get("image", part.get("url", part.get("path"))))
                    if found is None and tokenize:
                        raise ValueError(
                            "A part of a dialogue is an image without a picture; give one as 'image'."
                        )
                    pictures.append(found)
                    plain.append({"type": "image"})
                elif part.get("type") == "text":
                    plain.append({"type": "text", "text": str(part["text"])})
                else:
                    raise ValueError(
                        f"A part of a dialogue has type {part.get('type')!r}; expected text or image."
                    )
            messages.append({"role": turn["role"], "content": plain})
        text = self.chat.write(messages, add_generation_prompt=add_generation_prompt).text
        if not tokenize:
            return text
        rows = self.tokenizer.rows([text])
        ids = torch.tensor(rows)
        count = max(1, len(pictures))
        seen = image_attention_mask(ids, self.image_token_id, None, count, image_attention)
        return BatchFeature(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": self._pixels(rows, [pictures], count, None, self.image_processor),
                "image_attention_mask": seen,
            }
        )

    @property
    def chat_template(self) -> Any:
        """The tokenizer's template of dialogues."""
        return self.tokenizer.chat_template

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_attention_mask"]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        fetch: Fetch | None = None,
        image_processor: IdeficsImageProcessor | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Self:
        """Read ``preprocessor_config.json`` and ``tokenizer.json`` from a folder or a hub id.

        ``image_processor`` and ``tokenizer`` take the place of the checkpoint's; ``settings`` replace fields of the
        image processor and settings of the tokenizer (``padding_side``, ``truncation_side``, ``max_length``, … :
        ``models.tokenizer.SETTINGS``).

        Raises:
            ValueError: there is no such checkpoint, files are missing or damaged, or a setting is not known, or is one
                of a tokenizer that was given ready-made.
        """
        of_text = {name: settings.pop(name) for name in sorted(SETTINGS & settings.keys())}
        if tokenizer is not None and of_text:
            raise ValueError(
                f"{', '.join(of_text)} came beside tokenizer=, which has settings of its own; make it with these."
            )
        folder = CheckpointFolder(path, HubOptions(revision, cache_dir, token, local_files_only, subfolder))
        said = read_settings(folder)
        turns = said.get("add_end_of_utterance_token")
        if turns is None and (beside := folder.find(PROCESSOR_FILE)):
            turns = received.read_settings(beside).get("add_end_of_utterance_token")
        with blaming(f"the processor of {folder.name}"):
            images = image_processor or IdeficsImageProcessor.from_dict(said)
            return cls(
                images.changed(settings),
                tokenizer or IdeficsTokenizer.from_files(folder.find, folder.name, of_text),
                add_end_of_utterance_token=turns,
                fetch=fetch,
            )

    def to_dict(self) -> dict[str, Any]:
        """Settings of the processor and, under ``image_processor``, of the pictures."""
        return {
            "processor_class": "IdeficsProcessor",
            "add_end_of_utterance_token": self.add_end_of_utterance_token,
            "image_processor": self.image_processor.to_dict(),
        }

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write both parts so that this class and Transformers read them; the paths of the settings are returned."""
        files = self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        path = Path(folder) / PROCESSOR_FILE
        if self.add_end_of_utterance_token is None:
            path.unlink(missing_ok=True)
            return files
        values = {
            "processor_class": "IdeficsProcessor",
            "add_end_of_utterance_token": self.add_end_of_utterance_token,
        }
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return [*files, str(path)]


def _prompts(images: Any, text: Any) -> list[list[Any]]:
    """The prompts of a call, each a list of its items."""
    if text is None:
        text, images = images, None
    if text is None:
        raise ValueError("The processor was given nothing; pass a prompt, a list of texts and pictures.")
    if images is None:
        items = [text] if isinstance(text, str) or not isinstance(text, (list, tuple)) else list(text)
        batched = any(isinstance(item, (list, tuple)) for item in items)
        prompts = items if batched else [items]
        # Beside whole prompts a bare string or picture is a prompt of its own.
        result = [list(p) if isinstance(p, (list, tuple)) else [p] for p in prompts]
        if not result or not all(result):
            raise ValueError("A prompt is empty; give at least one text or picture.")
        return result
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    texts = [text] if isinstance(text, str) else list(text)
    if len(texts) != len(images):
        raise ValueError(
            f"{len(texts)} texts came with {len(images)} entries of images; give one list of pictures for "
            "each text."
        )
    if not all(isinstance(t, str) for t in texts):
        raise ValueError(
            "text holds something that is no string; with images beside it, text is strings alone."
        )
    if isinstance(images[0], (list, tuple)):
        return [[t, *shown] for t, shown in zip(texts, images, strict=True)]
    return [[shown, t] for t, shown in zip(texts, images, strict=True)]


def picture_path(text: str) -> str | None:
    """A string that is the path of a picture file, or None for one that is text.

    A file that is there is a picture, whatever its name. Of what is not there, one line that ends as picture files do
    is taken for a path, unless it reads as a sentence: its first word holds no separator and more than two follow.

    Raises:
        ValueError: it is a path and nothing is there.
    """
    if not picture_suffix(text) or "\n" in text or len(text) > _LONGEST_PATH:
        return None
    path = Path(text).expanduser()
    if path.is_file():
        return str(path)
    words = text.split(" ")
    if len(words) > 3 and not {"/", "\\"} & set(words[0]):
        return None
    raise ValueError(
        f"A prompt names the picture {text}, which is not there (looked for in {Path.cwd()}); check the path, or end "
        "the text with a line break if it is meant as text."
    )

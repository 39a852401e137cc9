"""`interloom data demo`: the drawn scenes of `scenes` as ordinary shards.

    OUT/train/00000.tar …   key.png, key.txt (caption), key.json ({"nouns": […]}): no masks
    OUT/val/00000.tar …     the same and key.mask.png, uint8 class ids, 0 is the background
    OUT/classes.txt         one class a line, the order of the ids 1, 2, …
    OUT/backdrops.txt       nouns of the captions that stand for the background
    OUT/tokenizer/          tokenizer and image settings, as GroupViTProcessor reads them
    OUT/demo.json           what it was made with

The same arguments give the same bytes, however many processes draw. A folder that was cut off is completed.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...files import sweep, write_atomically
from ...parallel.processes import end_with_parent
from ..shards.index import index_path
from ..shards.writer import ShardFile, write_manifest
from .backdrops import BACKDROP_NAMES
from .objects import CLASS_NAMES, COLOUR_NAMES
from .scenes import CAPTION_WORDS, draw_scene

if TYPE_CHECKING:
    from ....models.groupvit import GroupViTProcessor

TRAIN_SIZE, VAL_SIZE = 64, 128
# Held-out scenes are numbered from here, so no number of training scenes reaches them.
VAL_START = 1_000_000_000
_SCENES_PER_SHARD = 512
_FORMAT = 1

PAD, UNKNOWN, START, END = "<|pad|>", "<|unknown|>", "<|startoftext|>", "<|endoftext|>"


def write_demo(out: Path, *, train: int = 8192, val: int = 300, seed: int = 0) -> None:
    """Write the pairs, or what is missing of them.

    Raises:
        ValueError: numbers out of range, or `out` holds a demo made with other arguments.
    """
    if train < 1 or val < 0 or seed < 0:
        raise ValueError(
            f"train={train}, val={val}, seed={seed} given, expected train >= 1, val >= 0, seed >= 0"
        )
    if train > VAL_START:
        raise ValueError(f"train={train} given, expected at most {VAL_START}")
    made_with = {"format": _FORMAT, "kind": "pairs", "train": train, "val": val, "seed": seed}
    _claim(out, made_with)
    for folder in (out, out / "train", out / "val"):
        sweep(folder)
    tasks = [
        (split, shard, range(first + start, first + min(start + _SCENES_PER_SHARD, count)))
        for split, first, count in (("train", 0, train), ("val", VAL_START, val))
        for shard, start in enumerate(range(0, count, _SCENES_PER_SHARD))
    ]
    draw = partial(_write_shard, str(out), seed)
    workers = min(len(tasks), os.cpu_count() or 1)
    if workers > 1:
        # Spawned, not forked: the caller may run threads.
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
            list(pool.map(draw, *zip(*tasks, strict=True)))
    else:
        for task in tasks:
            draw(*task)
    for split in sorted({split for split, *_ in tasks}):
        write_manifest(out / split)
    build_processor().save_pretrained(out / "tokenizer")
    write_atomically(str(out / "backdrops.txt"), _lines(BACKDROP_NAMES))
    # Last: where it is, the demo is complete.
    write_atomically(str(out / "classes.txt"), _lines(CLASS_NAMES))


def build_processor() -> GroupViTProcessor:
    """Tokenizer of the demo's words and preprocessing of its images."""
    from ....models.groupvit import GroupViTProcessor
    from ....models.groupvit.image_processing import GroupViTImageProcessor
    from ....models.groupvit.tokenizer import GroupViTTokenizer
    from ....models.normalization import IMAGENET_MEAN, IMAGENET_STD

    images = GroupViTImageProcessor(
        size={"shortest_edge": TRAIN_SIZE},
        crop_size={"height": TRAIN_SIZE, "width": TRAIN_SIZE},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    tokenizer = GroupViTTokenizer(build_tokenizer(), bos_token=START, eos_token=END, pad_token=PAD)
    return GroupViTProcessor(images, tokenizer)


def build_tokenizer() -> Any:
    """Word-level `tokenizers.Tokenizer` of the demo's captions and prompts, with start and end tokens.

    The end token has the highest id, so both rules of finding it in the text tower agree.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    from ....models.groupvit.templates import IMAGENET_TEMPLATES

    split = pre_tokenizers.Whitespace()
    texts = [*(template.replace("{}", " ") for template in IMAGENET_TEMPLATES), *CAPTION_WORDS]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.lower())}
    words |= {*CLASS_NAMES, *BACKDROP_NAMES, *COLOUR_NAMES}
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, *sorted(words), START, END])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = split  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{START} $A {END}",
        special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])],
    )
    tokenizer.add_special_tokens([PAD, UNKNOWN, START, END])
    return tokenizer


def _claim(out: Path, made_with: dict[str, Any]) -> None:
    """Make the folder ours, so shards found in it are known to be of the same demo."""
    marker = out / "demo.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found != made_with:
            raise ValueError(
                f"{out} holds a demo made with {found}, not {made_with}; remove it or choose another folder"
            )
        return
    if any((out / split).exists() for split in ("train", "val")):
        raise ValueError(f"{out} holds other data; choose another folder for the demo")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(str(marker), (json.dumps(made_with) + "\n").encode())


def _lines(names: Iterable[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write_shard(out: str, seed: int, split: str, shard: int, scenes: range) -> None:
    path = Path(out) / split / f"{shard:05d}.tar"
    if Path(index_path(path)).exists():
        return
    with ShardFile(path, metadata={"source": "demo"}) as file:
        for index in scenes:
            scene = draw_scene(seed, index, VAL_SIZE if split == "val" else TRAIN_SIZE)
            members = {
                "png": _png(Image.fromarray(scene.image)),
                "txt": scene.caption.encode(),
                "json": json.dumps({"nouns": scene.nouns}).encode(),
            }
            if split == "val":
                members["mask.png"] = _png(Image.fromarray(scene.mask))
            file.add(f"{index:010d}", members, images=1)

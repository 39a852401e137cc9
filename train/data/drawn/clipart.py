"""``interloom data clipart``: drawings by people as pairs, and collages of held-out ones with true masks.

Made for Debian's package ``openclipart-png`` (8,121 public-domain drawings), but any folder of transparent PNGs
sorted into folders will do:

    OUT/train, OUT/val          pairs by the ordinary builder: captions are file and folder names
    OUT/collages                held-out drawings of different categories side by side on white, with masks
    OUT/collages/classes.txt    the categories: top-level folders with enough held-out drawings
    OUT/tokenizer               byte-pair encoding learnt from the training captions
    OUT/words.txt               nouns: words of folders and frequent words of names

The alpha channel becomes a mask of the collages; nothing in training sees it.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....models.pictures import PictureError, open_picture, upright
from ...files import write_atomically
from ..names import caption_from_path
from ..pairs.build import BuildOptions, build_shards, hold_out
from ..pairs.folders import FolderSource
from ..pairs.pair_source import PairSource
from ..report import BadSample
from ..shards.writer import ShardWriter

HOLDOUT, VOCABULARY, MAX_SIDE = 0.1, 2048, 128
COLLAGE_SIZE, DRAWINGS = 128, 2
MIN_DRAWINGS, MIN_WORD_COUNT = 12, 12
# Folders whose name tells nothing of what is drawn.
NAMELESS = frozenset({"unsorted", "special"})
PAD, START, END, UNKNOWN = "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


def write_clipart(
    out: Path,
    source: Path,
    *,
    collages: int = 200,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write everything; returns how many pairs, held-out pairs and collages there are.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: too few categories for collages.
    """
    if not source.is_dir():
        raise FileNotFoundError(
            f"no clip art at {source}; install Debian's package openclipart-png, or give --source FOLDER"
        )
    drawings = FolderSource(source, "names")
    train, val = hold_out(drawings, HOLDOUT)
    captions = [caption_from_path(pair.name) for pair in _pairs(train)]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "words.txt", "".join(f"{w}\n" for w in nouns(captions)).encode())
    write_tokenizer(out / "tokenizer", captions)
    options = BuildOptions(nouns="wordlist", words=str(out / "words.txt"), max_side=MAX_SIDE)
    counts = {}
    for name, part in (("train", train), ("val", val)):
        report = build_shards(
            part, out / name, options, workers=workers, max_skip_rate=0.1, progress=progress
        )
        counts[name] = report.seen - report.skipped
    counts["collages"] = write_collages(out / "collages", val, collages, seed)
    return counts


def _pairs(source: PairSource) -> Iterator[Any]:
    return (pair for pair in source.rows(0, len(source)) if not isinstance(pair, BadSample))


def nouns(captions: list[str]) -> list[str]:
    """Words that are worth a prompt: those in at least 12 captions, longer than two letters."""
    counts = Counter(word for caption in captions for word in set(caption.lower().replace(",", " ").split()))
    return sorted(word for word, count in counts.items() if count >= MIN_WORD_COUNT and len(word) > 2)


def write_tokenizer(folder: Path, captions: list[str]) -> None:
    """Byte-pair encoding of exactly 2,048 entries at most; the four special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from ....models.groupvit.templates import IMAGENET_TEMPLATES

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, UNKNOWN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, *IMAGENET_TEMPLATES], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 3)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str().encode())
    names = {
        "bos_token": START,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "model_max_length": 32,
    }
    write_atomically(folder / "tokenizer_config.json", (json.dumps(names, indent=1) + "\n").encode())


def write_collages(folder: Path, held_out: PairSource, count: int, seed: int) -> int:
    """Collages of two held-out drawings of different categories, as a shard with masks."""
    by_category: dict[str, list[bytes]] = {}
    for pair in _pairs(held_out):
        category = pair.name.split("/")[0].replace("_", " ")
        by_category.setdefault(category, []).append(pair.image)
    classes = sorted(
        name for name, found in by_category.items() if len(found) >= MIN_DRAWINGS and name not in NAMELESS
    )
    if len(classes) < DRAWINGS:
        raise ValueError(
            f"collages need {DRAWINGS} top-level folders with {MIN_DRAWINGS} held-out drawings, found "
            f"{len(classes)}; give a larger folder with --source"
        )
    rng = np.random.default_rng(seed)
    if (folder / "000000.idx").exists():
        return count
    with ShardWriter(folder, samples_per_shard=max(1, count), metadata={"source": "collages"}) as writer:
        for number in range(count):
            canvas = Image.new("RGB", (COLLAGE_SIZE, COLLAGE_SIZE), "white")
            mask = np.zeros((COLLAGE_SIZE, COLLAGE_SIZE), np.uint8)
            chosen: list[str] = []
            for category in (classes[i] for i in rng.permutation(len(classes))):
                label = classes.index(category) + 1
                if _paste(canvas, mask, by_category[category], len(chosen), label, rng):
                    chosen.append(category)
                if len(chosen) == DRAWINGS:
                    break
            image, labels = io.BytesIO(), io.BytesIO()
            canvas.save(image, "PNG")
            Image.fromarray(mask).save(labels, "PNG")
            members = {
                "png": image.getvalue(),
                "txt": " and ".join(chosen).encode(),
                "mask.png": labels.getvalue(),
            }
            writer.add(f"{number:06d}", members, images=1)
    write_atomically(folder / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    return count


def _paste(
    canvas: Image.Image,
    mask: np.ndarray,
    drawings: list[bytes],
    place: int,
    label: int,
    rng: np.random.Generator,
) -> bool:
    """Put a drawing of a category into its column of the canvas; False if none has both transparency and ink."""
    column = COLLAGE_SIZE // DRAWINGS
    for _ in range(20):
        data = drawings[int(rng.integers(len(drawings)))]
        try:
            drawing = upright(open_picture(data)).convert("RGBA")
        except (PictureError, OSError):
            continue
        drawing.thumbnail((column, COLLAGE_SIZE), Image.Resampling.LANCZOS)
        alpha = np.asarray(drawing.getchannel("A")) >= 128
        if 0.05 < alpha.mean() < 0.98 and min(drawing.size) >= column // 3:
            break
    else:
        return False
    left = place * column + int(rng.integers(0, column - drawing.width + 1))
    top = int(rng.integers(0, COLLAGE_SIZE - drawing.height + 1))
    canvas.paste(drawing, (left, top), drawing)
    mask[top : top + drawing.height, left : left + drawing.width][alpha] = label
    return True

"""Files made to harm: each ends with one sentence, or with its bad record counted, in little memory and time.

Every case is drawn into an empty folder and given to the command, in a process of its own (see ``conftest.py``). All of
them run with ``make test-faults``; those marked as the sample run with ``make test`` too. SECURITY.md names the kinds.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from interloom.train.cli import _guard, main
from PIL import Image

SECRET = "a-secret-of-this-machine"
Call = Callable[[], int]


class Case(NamedTuple):
    """What is done with the folder, how it must end, and a word of what is said."""

    call: Call
    code: int
    says: str


DRAWN: dict[str, Callable[[Path], Case]] = {}
SAMPLE: set[str] = set()


def case(*, sample: bool = False) -> Any:
    """Collect a function that draws a case."""

    def add(draw: Callable[[Path], Case]) -> Callable[[Path], Case]:
        name = draw.__name__.removeprefix("draw_")
        DRAWN[name] = draw
        if sample:
            SAMPLE.add(name)
        return draw

    return add


def command(*arguments: object) -> Call:
    return lambda: main([str(argument) for argument in arguments])


def guarded(work: Callable[[], object]) -> Call:
    """What a command does inside, under the command's own way of ending."""

    def call() -> int:
        work()
        return 0

    return lambda: _guard(call)


# Checkpoints


def picture(path: Path, size: tuple[int, int] = (24, 24)) -> Path:
    Image.new("RGB", size, (200, 30, 60)).save(path)
    return path


def checkpoint(folder: Path, **config: object) -> Path:
    """A whole tiny GroupViT; ``a__b=value`` changes its ``config.json``."""
    from interloom.models import GroupViTConfig, GroupViTModel
    from interloom.models.groupvit.images import GroupViTImageProcessor
    from interloom.models.groupvit.processing import GroupViTProcessor
    from interloom.models.groupvit.tokenizer import GroupViTTokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "cat": 2, "dog": 3, "a": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)],
    )
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    made = GroupViTConfig(
        text_config={
            **tower, "vocab_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16, "eos_token_id": 1,
        },  # pyright: ignore
        vision_config={
            **tower, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 4], "image_size": 32,
        },  # pyright: ignore
        projection_dim=8,
        projection_intermediate_dim=8,
    )  # fmt: skip
    GroupViTModel(made).save_pretrained(folder)
    images = GroupViTImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GroupViTProcessor(images, GroupViTTokenizer(backend)).save_pretrained(folder)
    change(folder / "config.json", **config)
    return folder


def change(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *parts, last = name.split("__")
        place = values
        for part in parts:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(values))


def convert(folder: Path) -> Call:
    return command("convert", folder, folder.parent / "out")


def segment(folder: Path, labels: str = "cat,dog") -> Call:
    image = picture(folder.parent / "a.png")
    out = folder.parent / "o.png"
    return command("segment", image, "--labels", labels, "--checkpoint", folder, "--out", out)


def state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return weights


@case(sample=True)
def draw_a_billion_layers(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", text_config__num_hidden_layers=10**9)), 2, "layers")


@case()
def draw_a_billion_stages(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", vision_config__depths=[10**9, 1])), 2, "layers")


@case()
def draw_a_vocabulary_of_a_trillion(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", text_config__vocab_size=10**12)), 2, "fit")


@case()
def draw_a_width_that_is_a_word(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", text_config__hidden_size="wide")), 2, "config.json")


@case()
def draw_no_heads(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", text_config__num_attention_heads=0)), 2, "config.json")


@case(sample=True)
def draw_a_deep_configuration(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    return Case(convert(folder), 2, "nested too deeply")


@case()
def draw_a_configuration_that_is_a_number(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "config.json").write_text("9" * 5000)
    return Case(convert(folder), 2, "config.json")


@case()
def draw_a_configuration_that_is_a_pipe(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return Case(convert(folder), 2, "config.json")


@case(sample=True)
def draw_weights_that_repeat_their_storage(root: Path) -> Case:
    folder = checkpoint(root / "m", text_config__vocab_size=10**9)
    weights = state(folder)
    name = "text_model.embeddings.token_embedding.weight"
    weights[name] = torch.zeros(1).expand(10**9, 8)
    torch.save(weights, folder / "pytorch_model.bin")
    return Case(convert(folder), 2, "are stored")


@case()
def draw_weights_in_a_compressed_archive(root: Path) -> Case:
    folder = checkpoint(root / "m")
    torch.save({**state(folder), "zeros": torch.zeros(2**24)}, root / "plain")
    packed = zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(root / "plain") as old, packed as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    return Case(convert(folder), 2, "unpacks to more")


@case(sample=True)
def draw_weights_with_code(root: Path) -> Case:
    class Code:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    folder = checkpoint(root / "m")
    torch.save({**state(folder), "code": Code()}, folder / "pytorch_model.bin")
    return Case(convert(folder), 2, "never loaded")


@case()
def draw_weights_whose_header_is_huge(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    return Case(convert(folder), 2, "safetensors")


@case(sample=True)
def draw_an_index_of_weights_that_leads_out(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "model.safetensors").rename(root / "elsewhere.safetensors")
    index = {"weight_map": {"logit_scale": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Case(convert(folder), 2, "leads out")


@case()
def draw_an_index_of_weights_with_an_absolute_name(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "model.safetensors").rename(root / "elsewhere.safetensors")
    index = {"weight_map": {"logit_scale": str(root / "elsewhere.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Case(convert(folder), 2, "leads out")


@case(sample=True)
def draw_tensorflow_weights_in_another_file(root: Path) -> Case:
    import h5py

    folder = checkpoint(root / "m")
    (folder / "model.safetensors").unlink()
    (root / "secret").write_text(SECRET)
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset(
            "groupvit/logit_scale:0", (1,), np.float32, external=[(str(root / "secret"), 0, 4)]
        )
    return Case(convert(folder), 2, "from other files")


@case()
def draw_tensorflow_weights_in_a_pipe(root: Path) -> Case:
    import h5py

    folder = checkpoint(root / "m")
    (folder / "model.safetensors").unlink()
    os.mkfifo(root / "pipe")
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset("groupvit/logit_scale:0", (1,), np.float32, external=[(str(root / "pipe"), 0, 4)])
    return Case(convert(folder), 2, "from other files")


@case()
def draw_tensorflow_weights_that_are_not_there(root: Path) -> Case:
    import h5py

    folder = checkpoint(root / "m")
    (folder / "model.safetensors").unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset("groupvit/logit_scale:0", (2**30,), np.float32, chunks=True, compression="gzip")
    return Case(convert(folder), 2, "takes 4,294,967,296 bytes")


@case()
def draw_tensorflow_weights_cut_off(root: Path) -> Case:
    import h5py

    folder = checkpoint(root / "m")
    (folder / "model.safetensors").unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset("groupvit/logit_scale:0", data=np.zeros(4000, np.float32))
    content = (folder / "tf_model.h5").read_bytes()
    (folder / "tf_model.h5").write_bytes(content[: len(content) // 2])
    return Case(convert(folder), 2, "HDF5")


@case(sample=True)
def draw_a_note_that_is_a_link_out(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (root / "secret").write_text(SECRET)
    (folder / "tokenizer.json").unlink()
    (folder / "notes.txt").symlink_to("../secret")
    return Case(convert(folder), 2, "leads out")


@case()
def draw_a_tokenizer_that_is_dev_zero(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    return Case(convert(folder), 2, "leads out")


@case()
def draw_a_note_that_is_a_pipe(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "notes.txt")
    return Case(convert(folder), 2, "pipe")


@case(sample=True)
def draw_a_tokenizer_that_grows(root: Path) -> Case:
    folder = checkpoint(root / "m")
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 5
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    return Case(segment(folder), 2, "times as long")


@case()
def draw_a_tokenizer_that_grows_by_an_expression(root: Path) -> Case:
    folder = checkpoint(root / "m")
    steps = [{"type": "Replace", "pattern": {"Regex": ""}, "content": "aaaa"}] * 12
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    return Case(segment(folder), 2, "times as long")


@case(sample=True)
def draw_a_tokenizer_that_does_not_end(root: Path) -> Case:
    folder = checkpoint(root / "m")
    expression = {
        "type": "Split",
        "pattern": {"Regex": "(?:(?:a|a)+)+!"},
        "behavior": "Isolated",
        "invert": False,
    }
    change(folder / "tokenizer.json", pre_tokenizer=expression)
    return Case(segment(folder, "a" * 60), 2, "reasonable time")


@case()
def draw_a_deep_tokenizer(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "tokenizer.json").write_text('{"normalizer":' + '{"a":' * 50_000 + "1" + "}" * 50_001)
    return Case(segment(folder), 2, "tokenizer")


@case()
def draw_a_tokenizer_of_odd_kinds(root: Path) -> Case:
    folder = checkpoint(root / "m")
    change(folder / "tokenizer.json", normalizer=[1, {"type": 7}], pre_tokenizer="x")
    return Case(segment(folder), 2, "tokenizer")


@case()
def draw_special_tokens_of_odd_kinds(root: Path) -> Case:
    folder = checkpoint(root / "m")
    change(folder / "tokenizer_config.json", eos_token=[1], model_max_length="long")
    return Case(segment(folder), 2, "tokenizer")


@case(sample=True)
def draw_pictures_of_twenty_thousand_pixels(root: Path) -> Case:
    folder = checkpoint(root / "m")
    change(folder / "preprocessor_config.json", size={"height": 20_000, "width": 20_000})
    return Case(segment(folder), 2, "20000")


@case()
def draw_means_of_odd_kinds(root: Path) -> Case:
    folder = checkpoint(root / "m")
    change(folder / "preprocessor_config.json", image_mean=[0.5, "x"], crop_size=[1])
    return Case(segment(folder), 2, "preprocessor_config.json")


@case(sample=True)
def draw_a_picture_that_starts_a_program(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (root / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    return Case(
        command("segment", root / "a.png", "--labels", "cat", "--checkpoint", folder, "--out", root / "o.png"),
        2, "image",
    )  # fmt: skip


@case()
def draw_a_picture_that_is_a_device(root: Path) -> Case:
    folder = checkpoint(root / "m")
    return Case(
        command("segment", "/dev/zero", "--labels", "cat", "--checkpoint", folder, "--out", root / "o.png"),
        2,
        "",
    )


@case(sample=True)
def draw_a_name_that_commands_the_terminal(root: Path) -> Case:
    name = "\x1b[2J\x1b]52;c;eA==\x07\u202e.png"
    return Case(command("segment", root / name, "--labels", "cat", "--out", root / "o.png"), 2, r"\x1b[2J")


@case()
def draw_a_weight_whose_name_commands_the_terminal(root: Path) -> Case:
    from safetensors.torch import save_file

    folder = checkpoint(root / "m")
    save_file({**state(folder), "\x1b[2J": torch.zeros(1)}, folder / "model.safetensors")
    return Case(convert(folder), 2, r"\x1b[2J")


# Shards


def shard(folder: Path, count: int = 3) -> Path:
    from interloom.train.data.shards import ShardFile

    data = io.BytesIO()
    Image.new("RGB", (24, 24)).save(data, "png")
    with ShardFile(folder / "000000.tar") as file:
        for number in range(count):
            file.add(f"{number:03d}", {"png": data.getvalue(), "txt": b"a cat"})
    return folder


def forge(folder: Path, columns: dict[str, Any] | None = None, header: dict[str, Any] | None = None) -> Path:
    """Write an index again with other values; its checksums hold."""
    from interloom.train.data.index import ShardIndex, _columns_digest, _crc32_array, _seal
    from safetensors.numpy import save

    index = ShardIndex(folder / "000000.idx")
    table = {name: index.column(name).copy() for name in index.columns()} | (columns or {})
    values = {
        **index.header,
        "columns_sha256": _columns_digest(table),
        "columns_crc32": {name: _crc32_array(column) for name, column in table.items()},
        **(header or {}),
    }
    (folder / "000000.idx").write_bytes(save(table, {"interloom": _seal(values)}))
    return folder


def read_all(folder: Path) -> Call:
    """Open shards and read every sample, as training does."""

    def work() -> None:
        from interloom.train.data.reader import ShardReader, ShardSet
        from interloom.train.data.report import BadSample, SkipReport

        shards = ShardSet.open([str(folder)], kind="pairs", max_skip_rate=1.0)
        reader, report = ShardReader(shards), SkipReport()
        for sample in range(len(shards)):
            try:
                reader.read(sample)
            except BadSample as bad:
                report.add_bad(bad)
        for line in report.lines():
            print(line)
        if not len(shards) or report.skipped:
            raise ValueError(f"{report.skipped} of {len(shards)} samples lost: {'; '.join(report.lines())}.")

    return guarded(work)


@case(sample=True)
def draw_offsets_of_two_to_the_62(root: Path) -> Case:
    folder = forge(shard(root / "s"), {"offset": np.full(6, 1 << 62, np.uint64)})
    return Case(read_all(folder), 2, "offset")


@case()
def draw_lengths_of_four_gigabytes(root: Path) -> Case:
    folder = forge(shard(root / "s"), {"length": np.full(6, (1 << 32) - 1, np.uint32)})
    return Case(read_all(folder), 2, "length")


@case()
def draw_columns_of_odd_types(root: Path) -> Case:
    folder = forge(shard(root / "s"), {"offset": np.full((6, 2), 0.5), "key_end": np.zeros(3, np.int64)})
    return Case(read_all(folder), 2, "column")


@case()
def draw_members_out_of_order(root: Path) -> Case:
    folder = forge(shard(root / "s"), {"first_member": np.array([0, 9, 2, 6], np.uint32)})
    return Case(read_all(folder), 2, "first_member")


@case()
def draw_an_index_of_a_quadrillion_samples(root: Path) -> Case:
    return Case(read_all(forge(shard(root / "s"), header={"samples": 10**15})), 2, "samples")


@case()
def draw_an_index_without_its_header(root: Path) -> Case:
    return Case(read_all(forge(shard(root / "s"), header={"bytes": "many", "extensions": 7})), 2, "index")


@case()
def draw_an_index_that_is_a_pipe(root: Path) -> Case:
    folder = shard(root / "s")
    (folder / "000000.idx").unlink()
    os.mkfifo(folder / "000000.idx")
    return Case(read_all(folder), 2, "pipe")


@case()
def draw_a_tar_that_is_a_pipe(root: Path) -> Case:
    folder = shard(root / "s")
    (folder / "000000.tar").unlink()
    os.mkfifo(folder / "000000.tar")
    return Case(read_all(folder), 2, "")


@case()
def draw_a_tar_to_index_that_is_a_pipe(root: Path) -> Case:
    (root / "s").mkdir()
    os.mkfifo(root / "s" / "a.tar")
    return Case(command("data", "pairs", root / "s", "--index-only", "--workers", 1), 2, "pipe")


@case()
def draw_a_tar_to_index_that_is_a_device(root: Path) -> Case:
    (root / "s").mkdir()
    (root / "s" / "a.tar").symlink_to("/dev/zero")
    return Case(command("data", "pairs", root / "s", "--index-only", "--workers", 1), 2, "")


@case(sample=True)
def draw_a_manifest_that_leads_out(root: Path) -> Case:
    from interloom.train.data.shards import MANIFEST

    shard(root / "elsewhere")
    folder = shard(root / "s")
    entry = {"shard": "../elsewhere/000000.tar", "samples": 3, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps({"shards": [entry]}))
    return Case(read_all(folder), 2, "leads out")


@case()
def draw_a_manifest_of_odd_kinds(root: Path) -> Case:
    from interloom.train.data.shards import MANIFEST

    folder = shard(root / "s")
    (folder / MANIFEST).write_text('{"shards": [7, {"shard": null}]}')
    return Case(read_all(folder), 2, "manifest")


@case()
def draw_a_deep_manifest(root: Path) -> Case:
    from interloom.train.data.shards import MANIFEST

    folder = shard(root / "s")
    (folder / MANIFEST).write_text("[" * 100_000)
    return Case(read_all(folder), 2, "manifest")


@case(sample=True)
def draw_one_key_with_forty_thousand_extensions(root: Path) -> Case:
    (root / "s").mkdir()
    with tarfile.open(root / "s" / "a.tar", "w") as tar:
        for number in range(40_000):
            tar.addfile(tarfile.TarInfo(f"key.{number}.txt"))
    return Case(command("data", "pairs", root / "s", "--index-only", "--workers", 1), 2, "")


# Sources of pairs


def folder_of(root: Path) -> Path:
    (root / "p").mkdir()
    for number in range(12):
        picture(root / "p" / f"good{number}.png", (24, 24 + number))
        (root / "p" / f"good{number}.txt").write_text("a cat")
    return root / "p"


def pairs(folder: Path, *more: object) -> Call:
    return command("data", "pairs", folder, folder.parent / "out", "--workers", 1, *more)


@case(sample=True)
def draw_two_links_to_the_folder_itself(root: Path) -> Case:
    folder = folder_of(root)
    (folder / "x").symlink_to(".")
    (folder / "y").symlink_to(".")
    return Case(pairs(folder, "--follow-links"), 0, "12 pairs")


@case()
def draw_a_picture_and_a_caption_that_lead_out(root: Path) -> Case:
    folder = folder_of(root)
    (root / "secret").write_text(SECRET)
    picture(folder / "bad.png")
    (folder / "bad.txt").symlink_to("../secret")
    return Case(pairs(folder, "--max-skip-rate", 0.5), 0, "link out of the folder")


@case()
def draw_a_picture_of_one_by_sixty_million(root: Path) -> Case:
    folder = folder_of(root)
    row = zlib.compress(b"\0\0\0\0" * 1, 9)

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", 1, 60_000_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    (folder / "bad.png").write_bytes(content)
    (folder / "bad.txt").write_text("a dog")
    return Case(pairs(folder, "--max-skip-rate", 0.5), 0, "too many pixels")


@case()
def draw_a_jpeg_of_two_thousand_scans(root: Path) -> Case:
    folder = folder_of(root)
    data = io.BytesIO()
    Image.effect_noise((1500, 1500), 50).convert("RGB").save(data, "jpeg", progressive=True)
    content = data.getvalue()
    last = content.rfind(b"\xff\xda")
    (folder / "bad.jpg").write_bytes(content[:-2] + content[last:-2] * 2000 + b"\xff\xd9")
    (folder / "bad.txt").write_text("a dog")
    return Case(pairs(folder, "--max-skip-rate", 0.5), 0, "")


@case(sample=True)
def draw_a_table_whose_paths_lead_out(root: Path) -> Case:
    (root / "t").mkdir()
    picture(root / "secret.png")
    rows = ["../secret.png,a cat", f"{root / 'secret.png'},a cat", "/etc/hostname,a cat", "a\0b.png,a cat"]
    (root / "t" / "a.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    return Case(command("data", "pairs", root / "t" / "a.csv", root / "out", "--workers", 1), 2, "")


@case()
def draw_a_table_that_is_a_pipe(root: Path) -> Case:
    os.mkfifo(root / "a.csv")
    return Case(command("data", "pairs", root / "a.csv", root / "out", "--workers", 1), 2, "pipe")


@case()
def draw_a_parquet_of_twenty_million_rows(root: Path) -> Case:
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(20_000_000, np.int8)), pyarrow.array(["x" * 100])
    )
    table = pyarrow.table({"image": rows, "caption": rows})
    pyarrow.parquet.write_table(table, root / "a.parquet", row_group_size=20_000_000)
    return Case(command("data", "pairs", root / "a.parquet", root / "out", "--workers", 1), 2, "")


# Documents


def documents(root: Path, source: Path, *more: object) -> Call:
    from interloom.train.data.interleaved.demo import write_tokenizer

    write_tokenizer(root / "tokenizer")
    return command(
        "data",
        "obelics",
        source,
        root / "out",
        "--tokenizer",
        root / "tokenizer",
        "--workers",
        1,
        "--no-filters",
        *more,
    )


def records(root: Path, *texts: str) -> Path:
    good = [
        json.dumps({"images": [None], "texts": [f"a document of several words, number {n}"]})
        for n in range(5)
    ]
    (root / "a.jsonl").write_text("\n".join([*good, *texts]) + "\n")
    return root / "a.jsonl"


@case(sample=True)
def draw_a_deep_record(root: Path) -> Case:
    return Case(documents(root, records(root, "[" * 100_000)), 0, "not a JSON object")


@case()
def draw_deep_metadata(root: Path) -> Case:
    bad = json.dumps({"images": [None], "texts": ["some words"], "metadata": "[" * 100_000})
    return Case(documents(root, records(root, bad)), 0, "")


@case()
def draw_a_picture_whose_name_has_nul(root: Path) -> Case:
    bad = json.dumps({"images": ["a\0b.png", None], "texts": [None, "some words beside it"]})
    return Case(documents(root, records(root, bad), "--image-root", root), 0, "")


@case()
def draw_a_picture_out_of_the_folder(root: Path) -> Case:
    bad = json.dumps(
        {"images": ["/etc/hostname", "../x.png", None], "texts": [None, None, "some words beside it"]}
    )
    (root / "pictures").mkdir()
    return Case(
        documents(root, records(root, bad), "--image-root", root / "pictures"), 0, "out of the image folder"
    )


@case()
def draw_records_that_are_a_pipe(root: Path) -> Case:
    os.mkfifo(root / "a.jsonl")
    return Case(documents(root, root / "a.jsonl"), 2, "pipe")


# Configurations that came with a run


def sources(root: Path, text: str) -> Call:
    (root / "config.yaml").write_text(text)

    def work() -> None:
        from interloom.train.data.reader import ShardSet
        from interloom.train.evaluation.document_sources import find_sources

        for folders in find_sources(root / "config.yaml", "val").values():
            ShardSet.open(folders, kind="documents")

    return guarded(work)


@case(sample=True)
def draw_a_configuration_that_asks_for_a_secret(root: Path) -> Case:
    return Case(
        sources(root, "data:\n  val:\n    a: ['http://127.0.0.1:9/${oc.env:HOME}']\n"), 2, "not resolved"
    )


@case()
def draw_a_configuration_that_names_an_address(root: Path) -> Case:
    return Case(sources(root, "data:\n  val:\n    a: ['http://127.0.0.1:9/x']\n"), 2, "not contacted")


@case(sample=True)
def draw_a_configuration_of_aliases(root: Path) -> Case:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return Case(sources(root, "\n".join(lines)), 2, "aliases")


@case()
def draw_a_configuration_of_a_hundred_billion_shards(root: Path) -> Case:
    return Case(sources(root, "data:\n  val:\n    a: ['/tmp/{0..100000000000}.tar']\n"), 2, "shards")


@case()
def draw_a_configuration_that_makes_an_object(root: Path) -> Case:
    return Case(sources(root, "data: !!python/object/apply:os.system ['touch ran']\n"), 2, "configuration")


@case()
def draw_a_deep_run_configuration(root: Path) -> Case:
    return Case(sources(root, "[" * 50_000), 2, "configuration")


# Sharded checkpoints


def sharded(root: Path, marker: str) -> Call:
    folder = root / "000001.shards"
    folder.mkdir()
    (folder / "COMPLETE").write_text(marker)
    (folder / "state.pt").write_bytes(b"x")
    return convert(folder)


@case()
def draw_a_marker_that_leads_out(root: Path) -> Case:
    entry = {"bytes": 1, "sha256": "0"}
    files = {"../../etc/hostname": entry, "a\0b": entry, ".metadata": entry, "state.pt": entry}
    return Case(sharded(root, json.dumps({"format": 1, "files": files})), 2, "")


@case()
def draw_a_deep_marker(root: Path) -> Case:
    return Case(sharded(root, "[" * 100_000), 2, "")


@case()
def draw_a_marker_of_odd_kinds(root: Path) -> Case:
    return Case(
        sharded(root, json.dumps({"format": 1, "files": {"a": {"bytes": 1e400, "sha256": []}}})), 2, ""
    )


@case()
def draw_a_checkpoint_of_code(root: Path) -> Case:
    class Code:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    torch.save({"interloom": Code(), "state_dict": {}}, root / "a.ckpt")
    return Case(command("convert", root / "a.ckpt", root / "out"), 2, "never loaded")


def run(name: str, root: Path, limited: Any) -> None:
    drawn = DRAWN[name](root)
    ending = limited(drawn.call, root)
    print(f"{name}: exit {ending.code}, {ending.seconds:.1f} s, {ending.peak / 2**20:,.0f} MiB")
    ending.check(drawn.code)
    assert drawn.says.lower() in (ending.out + ending.err).lower(), ending.out + ending.err
    assert SECRET not in ending.out + ending.err
    assert not (root / "ran").exists(), "code of a file ran"
    if drawn.code:
        assert not (root / "out" / "model.safetensors").exists(), "something half-written stays"
    for path in (root / "out").rglob("*") if (root / "out").exists() else ():
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_a_sample(name: str, tmp_path: Path, limited: Any) -> None:
    run(name, tmp_path, limited)


@pytest.mark.faults
@pytest.mark.parametrize("name", sorted(set(DRAWN) - SAMPLE))
def test_hostile_files(name: str, tmp_path: Path, limited: Any) -> None:
    run(name, tmp_path, limited)

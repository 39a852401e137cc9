"""Tokenizers, image settings and pictures that were made to harm, and names that command the terminal."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoints import change, checkpoint, convert, segment, state
from .harness import Case, case, command


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

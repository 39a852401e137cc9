"""A whole tiny GroupViT to be spoilt."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .harness import Call, command, picture


def checkpoint(folder: Path, **config: object) -> Path:
    """A whole tiny GroupViT; ``a__b=value`` changes its ``config.json``."""
    from interloom.models import GroupViTConfig, GroupViTModel
    from interloom.models.groupvit.image_processing import GroupViTImageProcessor
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

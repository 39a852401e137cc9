"""A tiny GroupViT with its processor, as objects and as a checkpoint, and six labelled pictures in a shard."""

import io
import json

import numpy as np
import pytest
import torch
from interloom.models import (
    GroupViTConfig,
    GroupViTModel,
    GroupViTProcessor,
    GroupViTTextConfig,
    GroupViTVisionConfig,
)
from interloom.models.groupvit import GroupViTImageProcessor, GroupViTTokenizer
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "a",
    "photo",
    "of",
    "cat",
    "dog",
    "bird",
    "car",
    "tree",
    "bus",
    ".",
]


def make_tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0))
    return GroupViTTokenizer(backend, model_max_length=12)


@pytest.fixture(name="model", scope="session")
def make_model():
    torch.manual_seed(0)
    text = GroupViTTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        eos_token_id=1,
    )
    vision = GroupViTVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        depths=[1, 1],
        num_group_tokens=[6, 3],
        num_output_groups=[6, 3],
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    model = GroupViTModel(GroupViTConfig(text, vision, projection_dim=8, projection_intermediate_dim=12))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
        model.logit_scale.fill_(4.0)
    return model.eval()


@pytest.fixture(name="processor", scope="session")
def make_processor():
    images = GroupViTImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return GroupViTProcessor(images, make_tokenizer())


@pytest.fixture(name="folder", scope="session")
def make_folder(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(name="shards")
def make_shards(tmp_path):
    from interloom.train.data.shards.writer import ShardFile

    root = tmp_path / "demo"
    rng = np.random.default_rng(0)
    (root / "val").mkdir(parents=True)
    (root / "classes.txt").write_text("cat\ndog\nbird\n")
    with ShardFile(root / "val" / "000000.tar", kind="pairs") as shard:
        for index in range(6):
            picture, mask = io.BytesIO(), io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(picture, "PNG")
            Image.fromarray(rng.integers(0, 4, (16, 16), dtype=np.uint8)).save(mask, "PNG")
            caption = ("a photo of a cat", "a dog", "a bird .", "a car", "a tree", "a dog")[index]
            shard.add(
                f"{index:04d}",
                {
                    "png": picture.getvalue(),
                    "mask.png": mask.getvalue(),
                    "txt": caption.encode(),
                    "json": json.dumps({"nouns": []}).encode(),
                },
            )
    return root

"""A tiny world to train in: shards of coloured squares, a word tokenizer, and the overrides of a small model."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 30)}
WORDS = ("a", "square", "on", "grey", "of", "photo", "the", *COLOURS)


@dataclass(frozen=True)
class TinyWorld:
    """Where the shards and the tokenizer lie, and the overrides of `interloom train` that go with them."""

    shards: Path
    tokenizer: Path

    @property
    def overrides(self) -> list[str]:
        return [
            f"data.train=[{self.shards}]",
            f"model.tokenizer={self.tokenizer}",
            "data.image_size=16",
            "data.batch_size=8",
            "data.workers=0",
            "model.multi_label=2",
            "model.config.projection_dim=8",
            "model.config.projection_intermediate_dim=16",
            # Weights five times as large as usual: at 0.02 the features of so small a model are so alike that batch
            # norm and contrast make the loss 300 times as steep as the weights are long, and rounding alone moves it
            # by 2e-5 (in one process too, from one micro-batch size to another).
            "model.config.vision_config.initializer_range=0.1",
            "model.config.text_config.initializer_range=0.1",
            "model.config.text_config.vocab_size=64",
            "model.config.text_config.hidden_size=16",
            "model.config.text_config.intermediate_size=32",
            "model.config.text_config.num_hidden_layers=2",
            "model.config.text_config.num_attention_heads=2",
            "model.config.text_config.max_position_embeddings=24",
            "model.config.text_config.eos_token_id=1",
            "model.config.vision_config.hidden_size=16",
            "model.config.vision_config.intermediate_size=32",
            "model.config.vision_config.depths=[1,1]",
            "model.config.vision_config.num_group_tokens=[4,0]",
            "model.config.vision_config.num_output_groups=[4]",
            "model.config.vision_config.num_attention_heads=2",
            "model.config.vision_config.image_size=16",
            "model.config.vision_config.patch_size=4",
            "trainer=cpu",
            "callbacks.progress=false",
            "callbacks.log_every=1",
        ]


def make_world(root: Path) -> TinyWorld:
    """Draw the shards and write the tokenizer below ``root``."""
    from interloom.train.data.shards.writer import ShardFile

    generator = np.random.default_rng(0)
    names = list(COLOURS)
    with ShardFile(root / "shards" / "000000.tar") as shard:
        for index in range(40):
            colour = names[index % len(names)]
            pixels = generator.integers(90, 130, (24, 24, 3), dtype=np.uint8)
            top, left = generator.integers(0, 12, 2)
            pixels[top : top + 10, left : left + 10] = COLOURS[colour]
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "png")
            shard.add(
                f"{index:04d}",
                {
                    "png": png.getvalue(),
                    "txt": f"a {colour} square on grey".encode(),
                    "json": json.dumps({"nouns": [colour, "square", "grey"]}).encode(),
                },
            )
    return TinyWorld(root / "shards", word_tokenizer(root / "tokenizer"))


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words that ends every text with its end token (id 1)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0, "<|endoftext|>": 1, "<|startoftext|>": 2, "<unknown>": 3}
    vocabulary |= {word: len(vocabulary) + place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 2), ("<|endoftext|>", 1)],
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def fork_ranks(work: Callable[[int], object], count: int, timeout: float = 240) -> None:
    """Run ``work(rank)`` in ``count`` forked processes with the environment that torchrun gives; all must return."""
    import torch.distributed as dist

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
        try:
            work(rank)
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * count

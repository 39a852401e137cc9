"""Records, tokenizers and shards that the tests of interleaved data share."""

import io
import json

import numpy as np
import pytest
from interloom.train.data.drawn.documents import write_demo, write_tokenizer
from PIL import Image


def picture(seed=0, size=(200, 160), kind="JPEG"):
    """An encoded image of blurred noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    stream = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def record(parts, general=None):
    """A record in the published schema from a list of texts (str) and images (anything else)."""
    return {
        "images": [None if isinstance(p, str) else p[1] for p in parts],
        "texts": [p if isinstance(p, str) else None for p in parts],
        "metadata": json.dumps([None if isinstance(p, str) else {"src": p[0]} for p in parts]),
        "general_metadata": json.dumps(general or {"url": "http://example.org"}),
    }


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interleaved") / "demo"
    write_demo(folder, train=150, val=20, seed=3)
    return folder

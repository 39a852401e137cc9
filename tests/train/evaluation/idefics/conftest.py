"""Tiny IDEFICS checkpoints: a trained run with adapters over drawn documents, and one that spells any text."""

import numpy as np
import pytest
import torch
from interloom.models import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsPerceiverConfig,
    IdeficsProcessor,
    IdeficsVisionConfig,
)
from interloom.models.idefics import IdeficsImageProcessor, IdeficsTokenizer
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "\n"]


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Folder of drawn documents: train, val, tokenizer."""
    folder = tmp_path_factory.mktemp("documents") / "demo"
    write_demo(folder, train=16, val=11, seed=1)
    return folder


@pytest.fixture(scope="session")
def adapted_run(documents, tmp_path_factory):
    """Directory of a run of two steps with adapters, whose frozen weights are bfloat16."""
    pytest.importorskip("peft")
    runs = tmp_path_factory.mktemp("runs")
    arguments = [
        "experiment=idefics_demo", f"runs_dir={runs}", "name=lora", f"data.sources.demo=[{documents / 'train'}]",
        f"data.val.demo=[{documents / 'val'}]", f"data.tokenizer={documents / 'tokenizer'}", "data.workers=0",
        "data.batch_size=4", "trainer=cpu", "trainer.max_steps=2", "trainer.precision=bf16-mixed", "task=none",
        "callbacks.progress=false", "optim.lr=0.05", "optim.warmup_steps=0", "model.frozen_dtype=bfloat16",
        "model.lora.rank=3", "model.lora.alpha=24", "model.lora.parts=both", "model.config.freeze_text_layers=true",
        "model.config.freeze_vision_layers=true", "model.config.hidden_size=32", "model.config.intermediate_size=48",
    ]  # fmt: skip
    assert main(["train", *arguments]) == 0
    return runs / "lora" / "latest"


def spelling_processor(size=28):
    """Every character is a token."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + [chr(c) for c in range(32, 127)])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL[:-1])
    return IdeficsProcessor(IdeficsImageProcessor(size), IdeficsTokenizer(backend))


@pytest.fixture(scope="session")
def speller(tmp_path_factory):
    """(folder, model, processor) of a random model over characters."""
    folder = tmp_path_factory.mktemp("speller")
    processor = spelling_processor()
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(
        IdeficsConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            alpha_initializer="ones",
            initializer_range=0.5,
            use_resampler=True,
            vision_config=IdeficsVisionConfig(
                embed_dim=16, image_size=28, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            ),
            perceiver_config=IdeficsPerceiverConfig(
                resampler_n_latents=3, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8
            ),
        )
    ).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="session")
def draw():
    """Writes a picture of one colour with some noise, of a number."""

    def write(path, number):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 40, (20, 24, 3)) + rng.integers(0, 215, 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        return path

    return write


@pytest.fixture
def on_ranks(tmp_path, fork_ranks):
    """Runs ``work()`` on several ranks; returns what each returned."""

    def start(work, count):
        store = tmp_path / f"ranks-{count}"
        store.mkdir()
        fork_ranks(lambda rank: torch.save(work(), store / f"{rank}.pt"), count)
        return [torch.load(store / f"{rank}.pt", weights_only=True) for rank in range(count)]

    return start

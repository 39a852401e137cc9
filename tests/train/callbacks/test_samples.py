"""What the samples callback shows of a model while it trains."""

import json
from types import SimpleNamespace

import pytest
import torch
from interloom.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsVisionConfig
from interloom.train.callbacks.samples import prompts
from interloom.train.config import CallbacksConfig, SamplesConfig, TrainConfig, TrainerConfig
from interloom.train.data.documents.dataset import DocumentsConfig
from interloom.train.data.drawn.documents import write_demo
from interloom.train.objectives.idefics.build import build_samples
from lightning.pytorch.plugins.precision import Precision
from PIL import Image


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "demo"
    write_demo(folder, train=2, val=12, seed=1)
    return DocumentsConfig(
        sources={"a": [str(folder / "train")]},
        val={"a": [str(folder / "val")]},
        tokenizer=str(folder / "tokenizer"),
        max_tokens=192,
        image_size=32,
        crop_scale=None,
        batch_size=2,
    )


class Logger:
    """Keeps what it is given, as a logger of text and pictures does."""

    def __init__(self):
        self.text, self.images = [], []

    def log_text(self, key, columns, data, step):
        self.text.append((key, columns, data, step))

    def log_image(self, key, images, step):
        self.images += [Image.open(path).size for path in images]


def model():
    torch.manual_seed(0)
    vision = IdeficsVisionConfig(
        embed_dim=16, image_size=32, patch_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    config = IdeficsConfig(
        vocab_size=128, additional_vocab_size=2, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=3, alpha_initializer="ones", vision_config=vision,
    )  # fmt: skip
    return IdeficsForVisionText2Text(config).train()


def configured(data, **samples):
    return TrainConfig(data=data, callbacks=CallbacksConfig(samples=SamplesConfig(**samples)), name="x")


def test_fixed_documents_are_continued_from_their_last_image(data, tmp_path):
    callback = build_samples(configured(data, every_steps=2, documents=3, max_new_tokens=5), tmp_path)
    net, logger = model(), Logger()
    trainer = SimpleNamespace(
        is_global_zero=True,
        global_step=1,
        max_steps=5,
        loggers=[logger, object()],
        precision_plugin=Precision(),
    )
    callback.on_train_start(trainer, None)
    for step in range(1, 6):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, SimpleNamespace(model=net), None, None, step)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] * 3 + [4] * 3 + [5] * 3
    assert net.training
    assert lines[:3] == [{**line, "step": 2} for line in lines[3:6]]
    assert len(logger.text) == len(logger.images) == 3
    assert logger.text[0][2][0] == [lines[0][name] for name in logger.text[0][1]]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step-{step:08d}.png" for step in (2, 4, 5)
    ]
    # Token by token, without a cache and with the document's images, the model says the same.
    prompt = callback._prompts[0]
    net.eval()
    ids = prompt.ids
    for _ in range(5):
        seen = torch.cat(
            [prompt.seen, prompt.seen[:, -1:].expand(-1, ids.shape[1] - prompt.seen.shape[1], -1)], 1
        )
        logits = net(ids, pixel_values=prompt.pixels, image_attention_mask=seen).logits[0, -1]
        logits[callback.forbidden] = -torch.inf
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    written = callback.tokenizer.decode(ids[0, prompt.ids.shape[1] :].tolist(), skip_special_tokens=True)
    assert lines[0]["written"] == written


def test_prompts_end_with_an_image_and_show_its_pixels(data, tmp_path):
    callback = build_samples(configured(data, every_steps=1, documents=4), tmp_path)
    tokenizer = callback.tokenizer
    found = callback.load()
    assert len(found) == 4
    for prompt in found:
        assert prompt.ids[0, -2:].tolist() == [tokenizer.require("<image>"), callback.forbidden[1]]
        assert (
            int((prompt.ids == tokenizer.require("<image>")).sum())
            == prompt.seen.shape[2]
            == len(prompt.pictures)
        )
        assert prompt.seen[0, -1].tolist() == [False] * (len(prompt.pictures) - 1) + [True]
        assert tokenizer.decode(prompt.reference.tolist(), skip_special_tokens=True).endswith(".")
        mean = torch.tensor(data.mean)[:, None, None]
        std = torch.tensor(data.std)[:, None, None]
        shown = (prompt.pixels[0] * std + mean) * 255
        torch.testing.assert_close(
            shown.permute(0, 2, 3, 1), torch.tensor(prompt.pictures).float(), atol=1e-2, rtol=0
        )


def test_documents_without_images_are_passed_over():
    batch = {
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
        "document_ids": torch.zeros(1, 4, dtype=torch.long),
        "image_attention_mask": torch.zeros(1, 4, 1, dtype=torch.bool),
    }
    assert prompts(batch, batch, 1, 5) == []


def test_what_cannot_be_sampled_is_refused(data, tmp_path):
    config = configured(data, every_steps=1)
    config.data.val = {}
    with pytest.raises(ValueError, match=r"data\.val, which is empty"):
        build_samples(config, tmp_path)
    config = configured(data, every_steps=1)
    config.data.val = {"a": ["x"]}
    config.trainer = TrainerConfig(strategy="fsdp2")
    with pytest.raises(ValueError, match="fsdp2"):
        build_samples(config, tmp_path)
    with pytest.raises(ValueError, match="every_steps=-1"):
        SamplesConfig(every_steps=-1)

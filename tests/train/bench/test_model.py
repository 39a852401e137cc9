"""The figures of ``interloom bench model``, without timing anything."""

import pytest
from interloom.train.bench.model import THEIRS, Contestant, benchmark_config
from interloom.train.bench.model_worker import decode
from interloom.train.cli import main


def test_the_model_is_as_announced():
    import torch
    from interloom.models import IdeficsForVisionText2Text

    config = benchmark_config()
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(config)
    assert 74e6 < model.num_parameters() < 76e6
    assert config.perceiver_config.resampler_n_latents == 64


def test_a_side_that_cannot_start_is_named(tmp_path, capfd):
    contestant = Contestant(THEIRS, tmp_path / "missing")
    with pytest.raises(ValueError, match="transformers side"):
        contestant.measure("decode", type("Case", (), {"__dataclass_fields__": {}})())
    contestant.close()


def test_one_measurement(monkeypatch):
    import torch
    from interloom.models import IdeficsConfig, IdeficsForVisionText2Text, IdeficsVisionConfig

    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    model = IdeficsForVisionText2Text(
        IdeficsConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            vision_config=IdeficsVisionConfig(
                embed_dim=16, image_size=14, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            ),
        )
    ).eval()  # fmt: skip
    figures = decode(model, {"images": 2, "prompt": 6, "tokens": 5, "threads": 1})
    assert len(figures["token_ids"]) == 5
    assert figures["tokens_per_second"] > 0
    assert figures["peak_mib"] > 0


def test_impossible_settings(capsys):
    assert main(["bench", "model", "--tokens", "1"]) == 2
    assert "at least" in capsys.readouterr().err


def test_both_sides_train_on_the_same_documents():
    import torch
    from interloom.train.bench.training import (
        IMAGE_TOKEN,
        TrainCase,
        draw_documents,
        packed_batch,
        padded_batch,
    )

    case = TrainCase(documents=12, max_tokens=256, max_images=6)
    documents = draw_documents(case, 1000, 14)
    padded, packed = padded_batch(documents), packed_batch(documents, case.max_tokens, case.max_images)
    found = []
    for row, ids in enumerate(packed["document_ids"]):
        first = 0
        for number in range(int(ids.max()) + 1):
            tokens = packed["input_ids"][row][ids == number]
            images = int((tokens == IMAGE_TOKEN).sum())
            found.append((tokens, packed["pixel_values"][row][first : first + images]))
            first += images
    assert len(found) == len(documents) == len(padded["input_ids"])
    for document, row, mask in zip(documents, padded["input_ids"], padded["attention_mask"], strict=True):
        assert torch.equal(row[mask == 1], document.ids)
        match = [pixels for tokens, pixels in found if torch.equal(tokens, document.ids)]
        assert len(match) == 1
        assert torch.equal(match[0], document.images)
    assert int((padded["labels"] >= 0).sum()) == int((packed["labels"] >= 0).sum())

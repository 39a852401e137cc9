"""What training exports goes on in Transformers: same tokens, same next step."""

import copy

import pytest
import torch
import transformers
from interloom.models.idefics import IdeficsForVisionText2Text, IdeficsProcessor, image_attention_mask
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo

MODEL = [
    "vocab_size=128", "additional_vocab_size=2", "hidden_size=32", "intermediate_size=48", "num_hidden_layers=2",
    "num_attention_heads=2", "alpha_initializer=ones", "vision_config.embed_dim=16", "vision_config.image_size=32",
    "vision_config.patch_size=16", "vision_config.intermediate_size=32", "vision_config.num_hidden_layers=1",
    "vision_config.num_attention_heads=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of three steps with the recipe's frozen parts trained, and its model/ folder."""
    root = tmp_path_factory.mktemp("export")
    write_demo(root / "demo", train=40, val=8, seed=1)
    options = [f"model.config.{option}" for option in MODEL]
    code = main(
        ["train", "experiment=idefics_demo", *options, f"data.sources={{demo: [{root}/demo/train]}}",
         f"data.val={{demo: [{root}/demo/val]}}", f"data.tokenizer={root}/demo/tokenizer", "data.image_size=32",
         "data.max_tokens=64", "data.batch_size=4", "data.workers=0", "trainer.max_steps=3", "task=none",
         "trainer=cpu", f"runs_dir={root}/runs", "callbacks.progress=false"]
    )  # fmt: skip
    assert code == 0
    return root / "runs" / "idefics_demo" / "latest" / "model"


def inputs(processor, rows=2, tokens=24):
    """Two rows that each see one image."""
    image = processor.tokenizer.require("<image>")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 100, (rows, tokens), generator=generator)
    ids[:, 2] = image
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 1, 3, 32, 32, generator=generator),
        "image_attention_mask": image_attention_mask(ids, image, None, 1),
    }


def test_transformers_generates_the_same_tokens(exported):
    ours = IdeficsForVisionText2Text.from_pretrained(exported)
    theirs = transformers.IdeficsForVisionText2Text.from_pretrained(exported).eval()
    batch = inputs(IdeficsProcessor.from_pretrained(exported))
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
        assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


def test_training_goes_on_in_transformers(exported, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert main(["convert", str(exported), str(merged), "--merge-vocabulary"]) == 0
    ours = IdeficsForVisionText2Text.from_pretrained(exported)
    theirs = transformers.IdeficsForVisionText2Text.from_pretrained(merged)
    batch = inputs(IdeficsProcessor.from_pretrained(merged))
    names = [name for name, _ in theirs.named_parameters() if "gated_cross_attn" in name]
    losses = {}
    for side, model in (("ours", ours), ("theirs", theirs)):
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses[side] = []
        for _ in range(3):
            loss = model(**batch, labels=batch["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[side].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], abs=1e-5)
    weights = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name in names:
            torch.testing.assert_close(parameter, weights[name], atol=1e-5, rtol=1e-4)


def test_merging_changes_no_logit(exported):
    model = IdeficsForVisionText2Text.from_pretrained(exported)
    batch = inputs(IdeficsProcessor.from_pretrained(exported))
    batch["input_ids"][0, 5] = model.config.total_vocab_size - 1
    merged = copy.deepcopy(model)
    merged.merge_additional_vocabulary()
    assert (merged.config.vocab_size, merged.config.additional_vocab_size) == (130, 0)
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-6)

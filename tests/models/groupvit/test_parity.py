"""GroupViT against Transformers' on tiny random checkpoints: outputs, hidden states, gradients, training noise."""

import pytest
import torch
from interloom.kernels.common.philox import gumbel_noise
from interloom.models import GroupViTModel, GroupViTTextModel, GroupViTVisionModel
from interloom.models.noise import Noise

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
LAYOUTS = {
    "published": {"depths": [2, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
    "one stage": {"depths": [1, 1], "num_group_tokens": [6, 0], "num_output_groups": [6, 6]},
    "ends grouping": {"depths": [1, 2], "num_group_tokens": [8, 3], "num_output_groups": [8, 3]},
    "fewer groups than tokens": {"depths": [2, 1], "num_group_tokens": [8, 0], "num_output_groups": [4, 4]},
    "no layers before": {"depths": [0, 1], "num_group_tokens": [5, 0], "num_output_groups": [5, 5]},
    "wide mixers": {
        "depths": [1, 1],
        "num_group_tokens": [6, 0],
        "num_output_groups": [6, 6],
        "assign_mlp_ratio": [1.0, 2.0],
        "assign_eps": 0.5,
    },
}


def build(tmp_path, layout="published", **text):
    """A Transformers model whose weights are all random, and ours loaded from what it saved."""
    torch.manual_seed(0)
    config = transformers.GroupViTConfig(
        text_config={**TEXT, **text},
        vision_config={**VISION, **LAYOUTS[layout], "num_hidden_layers": sum(LAYOUTS[layout]["depths"])},
        projection_dim=16,
        projection_intermediate_dim=24,
    )
    theirs = transformers.GroupViTModel(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
        for name, buffer in theirs.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path)
    return theirs, GroupViTModel.from_pretrained(tmp_path)


def inputs(eos=59, captions=3, images=3):
    torch.manual_seed(1)
    ids = torch.randint(3, 57, (captions, 9))
    mask = torch.ones_like(ids)
    for row in range(captions):
        end = 8 - 2 * row % 7
        ids[row, end] = eos
        ids[row, end + 1 :] = 1
        mask[row, end + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(images, 3, 32, 32)}


def assert_same(ours, theirs, where="output"):
    if torch.is_tensor(theirs):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda m: f"{where}: {m}")
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, where=f"{where}[{index}]")
    else:
        for key in theirs.keys():  # noqa: SIM118
            assert_same(ours[key], theirs[key], where=f"{where}.{key}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_equal(tmp_path, layout):
    theirs, ours = build(tmp_path, layout)
    flags = {"return_loss": True, "output_segmentation": True, "output_hidden_states": True}
    batch = inputs()
    expected = theirs(**batch, **flags)
    found = ours(**batch, **flags)
    assert_same(found, expected)
    assert found.segmentation_logits.shape == (3, 3, 32, 32)


@pytest.mark.parametrize(("eos", "marker"), [(59, 59), (2, 59)])
def test_both_end_token_rules(tmp_path, eos, marker):
    theirs, ours = build(tmp_path, eos_token_id=eos)
    batch = inputs(marker)
    batch["input_ids"][0, 2] = marker  # a second end token: the first counts, under both rules
    assert_same(ours(**batch), theirs(**batch))
    assert_same(ours.encode_text(batch["input_ids"]), theirs.text_model(batch["input_ids"]).pooler_output)


def test_text_padded_left_and_with_positions(tmp_path):
    theirs, ours = build(tmp_path)
    ids = inputs()["input_ids"][:1].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = torch.arange(9)[None] + 2
    for kwargs in ({"attention_mask": mask}, {"position_ids": positions}):
        assert_same(ours.text_model(ids, **kwargs), theirs.text_model(ids, **kwargs))


def test_towers_load_from_the_whole_checkpoint(tmp_path):
    theirs, _ = build(tmp_path)
    batch = inputs()
    flags = {"output_hidden_states": True, "output_attentions": True}
    text = GroupViTTextModel.from_pretrained(tmp_path)
    expected = transformers.GroupViTTextModel.from_pretrained(tmp_path).eval()
    tokens = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert_same(text(**tokens, **flags), expected(**tokens, **flags))
    vision = GroupViTVisionModel.from_pretrained(tmp_path)
    assert_same(vision(batch["pixel_values"], **flags), theirs.vision_model(batch["pixel_values"], **flags))


def test_features_equal(tmp_path):
    theirs, ours = build(tmp_path)
    batch = inputs(images=2)
    image = ours.get_image_features(batch["pixel_values"])
    assert_same(image, theirs.get_image_features(batch["pixel_values"]))
    text = ours.get_text_features(batch["input_ids"], batch["attention_mask"])
    expected = theirs.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    assert_same(text.pooler_output, expected)
    # Code for releases where these methods returned the tensor itself.
    assert_same(text / text.norm(dim=-1, keepdim=True), torch.nn.functional.normalize(expected))
    assert_same(torch.nn.functional.normalize(text), torch.nn.functional.normalize(expected))
    assert text.shape == (3, 16)


def test_gradients_equal(tmp_path):
    theirs, ours = build(tmp_path)
    batch = inputs()
    for model in (theirs, ours):
        model(**batch, return_loss=True).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_training_equals_given_the_same_noise(tmp_path, monkeypatch):
    theirs, ours = build(tmp_path)
    noise = Noise(seed=1234, row_offset=7)
    stages = iter((0, 1))

    def gumbel_softmax(logits, tau=1, hard=False, dim=-1):
        rows, groups, tokens = logits.shape
        seed = torch.tensor(noise.site(f"vision.stage{next(stages)}.assign"))
        drawn = gumbel_noise(seed, torch.arange(7, 7 + rows), groups, tokens)
        soft = (logits + drawn).softmax(dim)
        one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
        return one_hot - soft.detach() + soft

    monkeypatch.setattr(transformers.models.groupvit.modeling_groupvit, "gumbel_softmax", gumbel_softmax)
    # Batch norm over three samples magnifies rounding, so compare in float64.
    batch = inputs()
    batch["pixel_values"] = batch["pixel_values"].double()
    theirs.double(), ours.double()
    expected = theirs.train()(**batch, return_loss=True)
    expected.loss.backward()
    found = ours.train()(**batch, return_loss=True, noise=noise)
    found.loss.backward()
    assert_same(found.loss, expected.loss)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, grads[name], atol=1e-4, rtol=1e-4, msg=name)
    assert_same(ours.visual_projection[1].running_mean, theirs.visual_projection[1].running_mean)


def test_packed_text_equals_padded_and_so_do_gradients(tmp_path):
    _, ours = build(tmp_path)
    batch = inputs(captions=5)
    weight = torch.randn(5, 32)
    grads = []
    for pooled in (
        lambda: ours.text_model(batch["input_ids"], batch["attention_mask"]).pooler_output,
        lambda: ours.encode_text(batch["input_ids"]),
    ):
        ours.zero_grad()
        value = pooled()
        (value * weight).sum().backward()
        grads.append((value.detach(), {n: p.grad.clone() for n, p in ours.text_model.named_parameters()}))
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-5, rtol=1e-5)
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], grad, atol=1e-5, rtol=1e-4, msg=name)

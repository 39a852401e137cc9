"""GroupViT under Transformers' names: ways of calling, configurations, other people's loops and tools."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import transformers
from interloom import models
from interloom.models import GroupViTConfig, GroupViTModel, GroupViTTextConfig, GroupViTVisionConfig
from interloom.models.noise import Noise
from torch.utils import _pytree as pytree

TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "depths": [2, 1, 1],
    "num_group_tokens": [8, 4, 0],
    "num_output_groups": [8, 4, 4],
}


@pytest.fixture(name="folder", scope="module")
def make_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("groupvit")
    settings = {"projection_dim": 16, "projection_intermediate_dim": 24}
    config = transformers.GroupViTConfig(
        text_config=TEXT, vision_config={**VISION, "num_hidden_layers": 4}, **settings
    )
    transformers.GroupViTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(name="model")
def make_model(folder):
    return GroupViTModel.from_pretrained(folder)


@pytest.fixture(name="batch")
def make_batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 57, (4, 7))
    ids[:, -1] = 59
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(4, 3, 32, 32),
    }


def test_arrays_dictionaries_and_lists_say_the_same(model, batch):
    expected = model(**batch, return_loss=True)
    arrays = {name: value.numpy() for name, value in batch.items()}
    as_tf_makes_them = {name: a.astype(np.int32) if a.dtype.kind == "i" else a for name, a in arrays.items()}
    extra = {"token_type_ids": np.zeros_like(arrays["input_ids"])}
    order = ("input_ids", "pixel_values", "attention_mask")
    for found in (
        model(**arrays, return_loss=True),
        model({**as_tf_makes_them, **extra}, return_loss=True),
        model([arrays[name] for name in order], return_loss=True),
        model(**batch, **extra, return_loss=True, training=False),
    ):
        assert torch.equal(found.logits_per_image, expected.logits_per_image)
        assert torch.equal(found.loss, expected.loss)
    text = {name: arrays[name] for name in ("input_ids", "attention_mask")}
    features = model.get_text_features(text)
    assert torch.equal(features.pooler_output, model.get_text_features(**text).pooler_output)
    assert torch.equal(
        model.get_image_features({"pixel_values": arrays["pixel_values"]}).pooler_output,
        model.get_image_features(batch["pixel_values"]).pooler_output,
    )
    unit = features / features.norm(dim=-1, keepdim=True)  # as the documentation's examples do
    torch.testing.assert_close(unit, expected.text_embeds)


def test_training_runs_the_call_in_that_mode(model, batch):
    torch.manual_seed(3)
    inside = model(**batch, training=True).logits_per_image
    assert not model.training
    torch.manual_seed(3)
    assert torch.equal(inside, model.train()(**batch).logits_per_image)


def test_captions_without_an_end_token_are_pooled_as_in_transformers(folder, model, batch):
    theirs = transformers.GroupViTModel.from_pretrained(folder).eval()
    batch["input_ids"][1, -1] = 5
    with pytest.warns(UserWarning, match="without an end token"):
        found = model(**batch)
    torch.testing.assert_close(found.logits_per_image, theirs(**batch).logits_per_image, atol=1e-4, rtol=1e-4)


def test_tuples_stand_in_the_order_of_transformers(folder, model, batch):
    flags = {"output_attentions": True, "output_hidden_states": True, "output_segmentation": True}
    theirs = transformers.GroupViTModel.from_pretrained(folder).eval()
    expected = theirs(**batch, **flags, return_loss=True).to_tuple()
    found = model(**batch, **flags, return_loss=True, return_dict=False)
    assert isinstance(found, tuple)
    assert len(found) == len(expected)
    for ours, other in zip(found[:6], expected[:6], strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)
    for ours, other in zip(found[6:], expected[6:], strict=True):  # the towers' outputs
        assert len(ours) == 4  # 5.x leaves states and attentions out here, 4.x has them in these places
        for mine, another in zip(ours[:2], other[:2], strict=True):
            torch.testing.assert_close(mine, another, atol=1e-4, rtol=1e-4)


def test_a_tower_is_read_from_the_whole(folder):
    whole = GroupViTConfig.from_pretrained(folder)
    assert GroupViTTextConfig.from_pretrained(folder) == whole.text_config
    assert GroupViTVisionConfig.from_pretrained(folder) == whole.vision_config
    built = GroupViTConfig.from_text_vision_configs(
        whole.text_config, whole.vision_config, projection_dim=16, projection_intermediate_dim=24
    )
    assert (
        built.to_dict()
        == GroupViTConfig(
            text_config=whole.text_config.to_dict(),
            vision_config=whole.vision_config.to_dict(),
            projection_dim=16,
            projection_intermediate_dim=24,
        ).to_dict()
    )


def test_a_tower_is_not_read_from_another_model(tmp_path):
    transformers.CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'clip'"):
        GroupViTTextConfig.from_pretrained(tmp_path)


def test_tensorflow_s_names_are_the_same_classes():
    for name in ("GroupViTModel", "GroupViTTextModel", "GroupViTVisionModel"):
        assert getattr(models, f"TF{name}") is getattr(models, name)


def test_a_function_is_an_activation(model, batch):
    act = torch.nn.functional.gelu
    config = GroupViTConfig(
        text_config=GroupViTTextConfig(**TEXT, hidden_act=lambda x: x * torch.sigmoid(1.702 * x)),
        vision_config=GroupViTVisionConfig(**VISION, hidden_act=act),
        projection_dim=16,
        projection_intermediate_dim=24,
    )
    other = GroupViTModel(config).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(**batch).logits_per_image, model(**batch).logits_per_image)


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}])
def test_recomputed_gradients_are_the_same(model, batch, options):
    model.train()
    noise = Noise(seed=7)
    losses, gradients = [], []
    for recomputing in (False, True):
        if recomputing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            assert model.is_gradient_checkpointing
        loss = model(**batch, return_loss=True, noise=noise).loss
        model.encode_text(batch["input_ids"], noise=noise).sum().backward()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert torch.equal(*losses)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_training_compiles_to_one_graph(batch):
    small = {"depths": [1, 0], "num_group_tokens": [4, 0], "num_output_groups": [4, 4], "drop_path_rate": 0.1}
    config = GroupViTConfig(
        text_config={**TEXT, "num_hidden_layers": 1},
        vision_config={**VISION, **small},
        projection_dim=16,
        projection_intermediate_dim=24,
    )
    model = GroupViTModel(config).train()
    torch.manual_seed(5)
    expected = model(**batch, return_loss=True)
    expected.loss.backward()
    gradient = model.visual_projection[0].weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(5)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, return_loss=True)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(model.visual_projection[0].weight.grad, gradient)


def test_outputs_export_pickle_and_are_trees(model, batch):
    expected = model(**batch, return_loss=True)
    program = torch.export.export(model, (), {**batch, "return_loss": True})
    torch.testing.assert_close(
        program.module()(**batch, return_loss=True).logits_per_image, expected.logits_per_image
    )
    plain = pytree.tree_map(lambda tensor: tensor.detach(), expected)
    assert type(plain) is type(expected)
    assert torch.equal(plain.text_model_output.pooler_output, expected.text_model_output.pooler_output)
    again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(again.loss, expected.loss)
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    features = pytree.tree_map(
        lambda tensor: tensor.detach(), model.get_image_features(batch["pixel_values"])
    )
    assert torch.equal(copy.deepcopy(features).pooler_output, features.pooler_output)


def test_transformers_trainer_trains(model, batch, tmp_path):
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]

    def collate(items):
        return {name: torch.stack([item[name] for item in items]) for name in items[0]} | {
            "return_loss": True
        }

    settings = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model, settings, train_dataset=rows, eval_dataset=rows, data_collator=collate
    )
    before = model.eval()(**batch, return_loss=True).loss.item()
    trainer.train()
    assert model.eval()(**batch, return_loss=True).loss.item() < before
    assert model.num_parameters(exclude_embeddings=True) < model.num_parameters()


def test_the_token_table_is_resized(model, batch, tmp_path):
    before = model.eval()(**batch).logits_per_image
    old = model.get_input_embeddings().weight.detach().clone()
    table = model.resize_token_embeddings(61, pad_to_multiple_of=8)
    assert table.weight.shape == (64, 16)
    assert model.config.text_config.vocab_size == 64
    torch.testing.assert_close(table.weight[60:].detach(), old.mean(0).expand(4, -1))
    assert torch.equal(model(**batch).logits_per_image, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(GroupViTModel.from_pretrained(tmp_path)(**batch).logits_per_image, before)
    with pytest.raises(ValueError, match="no token table"):
        models.GroupViTVisionModel.from_pretrained(tmp_path).resize_token_embeddings(4)
    with pytest.raises(ValueError, match=r"pad_to_multiple_of=1\.3; give positive integers"):
        model.resize_token_embeddings(61, pad_to_multiple_of=1.3)

"""GroupViT checkpoints in every format, both ways, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from interloom.models import (
    GroupViTConfig,
    GroupViTModel,
    GroupViTTextConfig,
    GroupViTTextModel,
    GroupViTVisionConfig,
    GroupViTVisionModel,
)
from safetensors.torch import load_file, save_file

TF_FOLDER = Path(__file__).parents[2] / "fixtures" / "tf_groupvit"


@pytest.fixture(name="model")
def make_model():
    torch.manual_seed(0)
    text = GroupViTTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=38,
        eos_token_id=39,
    )
    vision = GroupViTVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        depths=[1, 1],
        num_group_tokens=[4, 0],
        num_output_groups=[4, 4],
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    model = GroupViTModel(GroupViTConfig(text, vision, projection_dim=8, projection_intermediate_dim=12))
    for name, buffer in model.named_buffers():
        if not name.endswith("tracked"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(name="batch")
def make_batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 37, (2, 5))
    ids[:, -1] = 39
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def logits(model, batch):
    return model(**batch).logits_per_image


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin", "sharded bin", "old bin"])
def test_formats_load_to_the_same_outputs(tmp_path, model, batch, kind):
    model.save_pretrained(tmp_path, max_shard_size="4KB" if kind == "sharded" else "5GB")
    names = {path.name for path in tmp_path.iterdir()}
    assert ("model.safetensors.index.json" in names) == (kind == "sharded")
    if "bin" in kind:
        state = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        if kind == "sharded bin":
            half = dict(list(state.items())[::2])
            rest = {k: v for k, v in state.items() if k not in half}
            for index, part in enumerate((half, rest)):
                torch.save(part, tmp_path / f"pytorch_model-{index}.bin")
            weight_map = {k: f"pytorch_model-{int(k not in half)}.bin" for k in state}
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
        else:
            state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
            torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    loaded = GroupViTModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.config == model.config


def test_tensorflow_weights_give_its_outputs():
    model = GroupViTModel.from_pretrained(TF_FOLDER)
    arrays = {k: torch.from_numpy(v) for k, v in np.load(TF_FOLDER / "outputs.npz").items()}
    inputs = {k: arrays[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    out = model(**inputs, return_loss=True, output_segmentation=True)
    for name in ("loss", "logits_per_image", "segmentation_logits", "text_embeds", "image_embeds"):
        torch.testing.assert_close(out[name], arrays[name].reshape(out[name].shape), atol=1e-4, rtol=1e-5)
    for tower in ("text", "vision"):
        last = out[f"{tower}_model_output"].last_hidden_state
        torch.testing.assert_close(last, arrays[f"{tower}_last_hidden_state"], atol=1e-4, rtol=1e-5)
    for index, found in enumerate(out.vision_model_output.attentions):
        torch.testing.assert_close(found, arrays[f"assignment_{index}"], atol=1e-4, rtol=1e-5)
    text = GroupViTTextModel.from_pretrained(TF_FOLDER)
    pooled = text(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(pooled, out.text_model_output.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_transformers_loads_what_is_saved(tmp_path, model, batch, shard):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    theirs, info = transformers.GroupViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(theirs.eval(), batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_options_of_our_own_survive_saving_and_do_not_disturb_transformers(tmp_path, model):
    model.config.vision_config.drop_path_rate = 0.1
    model.save_pretrained(tmp_path)
    assert GroupViTModel.from_pretrained(tmp_path).config.vision_config.drop_path_rate == 0.1
    transformers = pytest.importorskip("transformers")
    assert transformers.GroupViTConfig.from_pretrained(tmp_path).projection_dim == 8


def test_a_single_tower_saves_and_loads(tmp_path, model, batch):
    model.save_pretrained(tmp_path / "whole")
    vision = GroupViTVisionModel.from_pretrained(tmp_path / "whole")
    vision.save_pretrained(tmp_path / "vision")
    again = GroupViTVisionModel.from_pretrained(tmp_path / "vision")
    pixels = batch["pixel_values"]
    assert torch.equal(again(pixels).pooler_output, model.vision_model(pixels).pooler_output)


def test_dtype_and_device(tmp_path, model):
    model.save_pretrained(tmp_path)
    half = GroupViTModel.from_pretrained(tmp_path, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.visual_projection[1].num_batches_tracked.dtype == torch.int64
    with pytest.raises(ValueError, match="not a floating-point type"):
        GroupViTModel.from_pretrained(tmp_path, dtype="int8")


def test_saving_replaces_the_old_checkpoint_and_survives_failure(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    before = (tmp_path / "model.safetensors").read_bytes()

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fails)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_unknown_missing_and_misshapen_weights_are_listed(tmp_path, model):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.0.bias"]
    state["visual_projection.9.bias"] = torch.zeros(3)
    state["logit_scale"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit GroupViTModel") as caught:
        GroupViTModel.from_pretrained(tmp_path)
    text = str(caught.value)
    assert "missing weights (1): visual_projection.0.bias" in text
    assert "unknown weights (1): visual_projection.9.bias" in text
    assert "misshapen weights (1): logit_scale is [2], expected []" in text


def test_batch_counters_may_be_missing(tmp_path, model, batch):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if "tracked" not in k}, tmp_path / "model.safetensors")
    loaded = GroupViTModel.from_pretrained(tmp_path)
    assert int(loaded.visual_projection[1].num_batches_tracked) == 0
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _no_config(folder):
    (folder / "config.json").unlink()


def _broken_config(folder):
    (folder / "config.json").write_text("{")


def _other_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))


def _truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


class Malicious:
    def __reduce__(self):
        return (Path("/tmp/interloom-was-here").touch, ())


def _pickled_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Malicious()}, folder / "pytorch_model.bin")


def _not_a_state(folder):
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")


def _lost_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _broken_h5(folder):
    (folder / "model.safetensors").unlink()
    (folder / "tf_model.h5").write_bytes(b"no hdf5")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_no_weights, "has no weights; expected one of model.safetensors, pytorch_model.bin, tf_model.h5"),
        (_no_config, "has no config.json"),
        (_broken_config, "not valid JSON"),
        (_other_model, "is for model_type 'clip'"),
        (_truncated, "damaged or not a safetensors file"),
        (_pickled_code, "holds Python objects beside tensors"),
        (_not_a_state, "not a state dictionary"),
        (_lost_shard, "lacks shards named in model.safetensors.index.json"),
        (_broken_h5, "damaged or not an HDF5 file"),
    ],
)
def test_damaged_checkpoints_are_refused_in_words(tmp_path, model, harm, words):
    model.save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=words):
        GroupViTModel.from_pretrained(tmp_path)
    assert not Path("/tmp/interloom-was-here").exists()


def test_paths_that_are_no_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        GroupViTModel.from_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="does not exist"):
        GroupViTModel.from_pretrained(tmp_path / "nothing" / "here" / "at all")


def test_hub_ids_go_through_the_hubs_client(tmp_path, model, batch, monkeypatch):
    model.save_pretrained(tmp_path / "remote")
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options["revision"]))
        if repo != "owner/name":
            raise RepositoryNotFoundError("404: no such repository", response=_response())
        if not (tmp_path / "remote" / name).exists():
            raise EntryNotFoundError("404")
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(tmp_path / "remote" / name, tmp_path / "cache" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = GroupViTModel.from_pretrained("owner/name", revision="v1")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert asked == [("owner/name", "config.json", "v1"), ("owner/name", "model.safetensors", "v1")]
    with pytest.raises(ValueError, match=r"owner/other .*could not be fetched from the hub"):
        GroupViTModel.from_pretrained("owner/other")


def _response():
    import httpx

    return httpx.Response(404, request=httpx.Request("GET", "https://example.org"))


def test_offline_and_not_cached(tmp_path):
    with pytest.raises(ValueError, match="is not a local folder"):
        GroupViTModel.from_pretrained("owner/never-fetched", cache_dir=tmp_path, local_files_only=True)


def test_configurations_load_and_save_alone(tmp_path, model):
    model.config.save_pretrained(tmp_path / "config")
    assert GroupViTConfig.from_pretrained(tmp_path / "config") == model.config
    with pytest.raises(ValueError, match=r"no config.json"):
        GroupViTConfig.from_pretrained(tmp_path)

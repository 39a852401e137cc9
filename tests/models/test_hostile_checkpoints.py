"""Checkpoint folders made to harm: nothing of other files is read, no memory taken that the file does not have."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from interloom.models import GroupViTConfig, GroupViTModel, IdeficsConfig, IdeficsForVisionText2Text
from interloom.models.checkpoint import CheckpointFolder, read_bin
from interloom.models.groupvit.tensorflow import read_tf_weights
from interloom.models.received import read_json


def tiny() -> GroupViTConfig:
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return GroupViTConfig(
        text_config={**tower, "vocab_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 8},  # pyright: ignore
        vision_config={  # pyright: ignore
            **tower,
            "depths": [1, 1],
            "num_group_tokens": [4, 0],
            "num_output_groups": [4, 4],
            "image_size": 32,
        },
        projection_dim=8,
        projection_intermediate_dim=8,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    GroupViTModel(tiny()).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *parts, last = name.split("__")
        place = values
        for part in parts:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config__num_hidden_layers": 10**9},
        {"vision_config__depths": [10**9, 1]},
        {"text_config__hidden_size": 10**7},
        {"text_config__vocab_size": 10**12},
        {"text_config__vocab_size": "many"},
        {"text_config__hidden_size": None},
        {"text_config__num_attention_heads": 0},
        {"text_config": []},
        {"vision_config__depths": {"a": 1}},
        {"vision_config__image_size": 10**9},
        {"vision_config__patch_size": [16]},
        {"projection_dim": -4},
        {"projection_dim": 10**30},
    ],
)
def test_impossible_configurations(folder: Path, changes: dict[str, object]) -> None:
    edit(folder, **changes)
    with pytest.raises(ValueError, match=r"fit|damaged|divisible|multiple|one entry"):
        GroupViTModel.from_pretrained(folder)


def test_layers_of_idefics_are_bounded(tmp_path: Path) -> None:
    config = IdeficsConfig(num_hidden_layers=10**9, hidden_size=8, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"1,000,000,000 layers"):
        IdeficsForVisionText2Text.from_pretrained(tmp_path)


def test_a_deep_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "config.json")


@pytest.mark.timeout(20)
def test_pipes_devices_and_huge_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match=r"regular file|cannot be read"):
            read_json(path)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "large")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a\0b", 7, ["a"]])
def test_an_index_of_weights_stays_in_its_folder(folder: Path, name: object) -> None:
    weights = folder / "model.safetensors"
    (folder.parent / "outside.safetensors").write_bytes(weights.read_bytes())
    weights.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": name}}))
    with pytest.raises(ValueError, match=r"leads out|not a file name|not an index"):
        list(CheckpointFolder(folder).tensors())


def test_weights_that_are_a_link_out_of_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(ValueError, match="leads out"):
        list(CheckpointFolder(folder).tensors())


def test_hdf5_reads_its_own_bytes_alone(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 100)
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("plain", data=np.ones(4, np.float32))
        file.create_dataset("raw", (16,), np.float32, external=[(str(secret), 0, 64)])
    with pytest.raises(ValueError, match="from other files"):
        list(read_tf_weights(path))
    with h5py.File(path, "w") as file:
        file.create_dataset("pipe", (16,), np.float32, external=[(str(tmp_path / "pipe"), 0, 64)])
    with pytest.raises(ValueError, match="from other files"):
        list(read_tf_weights(path))
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout(shape=(16,), dtype=np.float32)
        layout[:] = h5py.VirtualSource(str(secret), "x", shape=(16,))
        file.create_virtual_dataset("virtual", layout)
    with pytest.raises(ValueError, match="from other files"):
        list(read_tf_weights(path))
    with h5py.File(path, "w") as file:
        file["link"] = h5py.ExternalLink(str(secret), "/x")
        file["soft"] = h5py.SoftLink("/plain")
        file.create_dataset("plain", data=np.ones(4, np.float32))
    assert [name for name, _ in read_tf_weights(path)] == ["plain"]


@pytest.mark.parametrize("how", [{}, {"chunks": True}, {"chunks": True, "compression": "gzip"}])
def test_hdf5_does_not_outgrow_its_file(tmp_path: Path, how: dict[str, object]) -> None:
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("huge", (2**30,), np.float32, **how)
    with pytest.raises(ValueError, match="takes 4,294,967,296 bytes"):
        list(read_tf_weights(path))


def test_tensors_that_repeat_their_storage(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(1).expand(10**5, 10**5)}, path)
    with pytest.raises(ValueError, match="are stored"):
        list(read_bin(path))


def test_archives_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    os.replace(tmp_path / "new", path)
    with pytest.raises(ValueError, match="unpacks to more"):
        list(read_bin(path))


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"PK\x03\x04", pickle.dumps({"a": print}), pickle.dumps(7)]
)
def test_no_advice_to_unpickle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(read_bin(path))
    assert "weights_only" not in str(caught.value)

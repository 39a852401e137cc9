"""Configurations and weights that were made to harm."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoints import checkpoint, convert, state
from .harness import SECRET, Case, case


@case(sample=True)
def draw_a_billion_layers(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", text_config__num_hidden_layers=10**9)), 2, "layers")


@case()
def draw_a_billion_stages(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", vision_config__depths=[10**9, 1])), 2, "layers")


@case()
def draw_a_vocabulary_of_a_trillion(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", text_config__vocab_size=10**12)), 2, "fit")


@case()
def draw_a_width_that_is_a_word(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", text_config__hidden_size="wide")), 2, "config.json")


@case()
def draw_no_heads(root: Path) -> Case:
    return Case(convert(checkpoint(root / "m", text_config__num_attention_heads=0)), 2, "config.json")


@case(sample=True)
def draw_a_deep_configuration(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    return Case(convert(folder), 2, "nested too deeply")


@case()
def draw_a_configuration_that_is_a_number(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "config.json").write_text("9" * 5000)
    return Case(convert(folder), 2, "config.json")


@case()
def draw_a_configuration_that_is_a_pipe(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return Case(convert(folder), 2, "config.json")


@case(sample=True)
def draw_weights_that_repeat_their_storage(root: Path) -> Case:
    folder = checkpoint(root / "m", text_config__vocab_size=10**9)
    weights = state(folder)
    name = "text_model.embeddings.token_embedding.weight"
    weights[name] = torch.zeros(1).expand(10**9, 8)
    torch.save(weights, folder / "pytorch_model.bin")
    return Case(convert(folder), 2, "are stored")


@case()
def draw_weights_in_a_compressed_archive(root: Path) -> Case:
    folder = checkpoint(root / "m")
    torch.save({**state(folder), "zeros": torch.zeros(2**24)}, root / "plain")
    packed = zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(root / "plain") as old, packed as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    return Case(convert(folder), 2, "unpacks to more")


@case(sample=True)
def draw_weights_with_code(root: Path) -> Case:
    class Code:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    folder = checkpoint(root / "m")
    torch.save({**state(folder), "code": Code()}, folder / "pytorch_model.bin")
    return Case(convert(folder), 2, "never loaded")


@case()
def draw_weights_whose_header_is_huge(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    return Case(convert(folder), 2, "safetensors")


@case(sample=True)
def draw_an_index_of_weights_that_leads_out(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "model.safetensors").rename(root / "elsewhere.safetensors")
    index = {"weight_map": {"logit_scale": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Case(convert(folder), 2, "leads out")


@case()
def draw_an_index_of_weights_with_an_absolute_name(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "model.safetensors").rename(root / "elsewhere.safetensors")
    index = {"weight_map": {"logit_scale": str(root / "elsewhere.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Case(convert(folder), 2, "leads out")


@case(sample=True)
def draw_tensorflow_weights_in_another_file(root: Path) -> Case:
    import h5py

    folder = checkpoint(root / "m")
    (folder / "model.safetensors").unlink()
    (root / "secret").write_text(SECRET)
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset(
            "groupvit/logit_scale:0", (1,), np.float32, external=[(str(root / "secret"), 0, 4)]
        )
    return Case(convert(folder), 2, "from other files")


@case()
def draw_tensorflow_weights_in_a_pipe(root: Path) -> Case:
    import h5py

    folder = checkpoint(root / "m")
    (folder / "model.safetensors").unlink()
    os.mkfifo(root / "pipe")
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset("groupvit/logit_scale:0", (1,), np.float32, external=[(str(root / "pipe"), 0, 4)])
    return Case(convert(folder), 2, "from other files")


@case()
def draw_tensorflow_weights_that_are_not_there(root: Path) -> Case:
    import h5py

    folder = checkpoint(root / "m")
    (folder / "model.safetensors").unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset("groupvit/logit_scale:0", (2**30,), np.float32, chunks=True, compression="gzip")
    return Case(convert(folder), 2, "takes 4,294,967,296 bytes")


@case()
def draw_tensorflow_weights_cut_off(root: Path) -> Case:
    import h5py

    folder = checkpoint(root / "m")
    (folder / "model.safetensors").unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset("groupvit/logit_scale:0", data=np.zeros(4000, np.float32))
    content = (folder / "tf_model.h5").read_bytes()
    (folder / "tf_model.h5").write_bytes(content[: len(content) // 2])
    return Case(convert(folder), 2, "HDF5")


@case(sample=True)
def draw_a_note_that_is_a_link_out(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (root / "secret").write_text(SECRET)
    (folder / "tokenizer.json").unlink()
    (folder / "notes.txt").symlink_to("../secret")
    return Case(convert(folder), 2, "leads out")


@case()
def draw_a_tokenizer_that_is_dev_zero(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    return Case(convert(folder), 2, "leads out")


@case()
def draw_a_note_that_is_a_pipe(root: Path) -> Case:
    folder = checkpoint(root / "m")
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "notes.txt")
    return Case(convert(folder), 2, "pipe")

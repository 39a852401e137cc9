"""Tiny language models as Transformers saves them, a tiny CLIP, and what is composed of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from interloom.models.idefics.composition.compose import ComposeOptions, Composition
from tokenizers import Tokenizer, models, pre_tokenizers

TOKENS = 97
BASE = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Name to (class of Transformers' models, what differs from BASE).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 1": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-4}),
    "llama grouped": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "eos_token_id": [2, 5]}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn by mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}  # fmt: skip


def write_tokenizer(folder: Path, tokens: int = TOKENS, **settings: Any) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, tokens)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**roles, **settings}))


def write_text(folder: Path, kind: str, **changes: Any) -> Any:
    """A random model of a kind, saved with a tokenizer."""
    config = getattr(transformers, f"{kind}Config")(**{**BASE, **changes})
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3)
            if name.endswith("norm.weight"):
                weight.add_(1.0)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower") / "clip"
    torch.manual_seed(2)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    return folder


@dataclass
class Composed:
    theirs: Any
    folder: Path
    ours: Any
    processor: Any


@pytest.fixture(scope="session")
def composed_of(tmp_path_factory, clip_folder):
    """Factory of models composed of an architecture and the tiny CLIP, each made once."""
    made: dict[str, Composed] = {}

    def get(name: str) -> Composed:
        if name not in made:
            kind, changes = ARCHITECTURES[name]
            folder = tmp_path_factory.mktemp("text") / "model"
            theirs = write_text(folder, kind, **changes)
            composition = Composition.of(folder, clip_folder, ComposeOptions(cross_layer_interval=2))
            made[name] = Composed(theirs, folder, composition.model(), composition.processor)
        return made[name]

    return get


@pytest.fixture
def texts():
    """Ids [2, 20] and a mask whose first row begins with padding."""
    ids = torch.randint(3, TOKENS, (2, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


@pytest.fixture(scope="session")
def write_text_of():
    return write_text


@pytest.fixture(scope="session")
def write_tokenizer_of():
    return write_tokenizer


def pytest_generate_tests(metafunc):
    """Tests that take ``architecture`` run for every one."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", list(ARCHITECTURES))

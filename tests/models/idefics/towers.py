"""Small image towers of Transformers, with random weights everywhere, and folders that hold them."""

from pathlib import Path

import torch
import transformers

VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
DINO = {k: v for k, v in VIT.items() if k != "intermediate_size"}
GROUPS = {
    **VIT, "num_hidden_layers": 3, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4],
}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}

# Name, class of the model, of its configuration, settings; the tokens an image has.
TOWERS = {
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", VIT, 17),
    "clip_gelu": ("CLIPVisionModel", "CLIPVisionConfig", {**VIT, "hidden_act": "gelu"}, 17),
    "clip_whole": ("CLIPModel", "CLIPConfig", {"vision_config": VIT, "text_config": TEXT}, 17),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VIT, 16),
    "siglip_whole": ("SiglipModel", "SiglipConfig", {"vision_config": VIT, "text_config": TEXT}, 16),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, 17),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}, 17),
    "dinov2_head": ("Dinov2ForImageClassification", "Dinov2Config", DINO, 17),
    "registers": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {**DINO, "num_register_tokens": 3}, 20,
    ),
    "groupvit": ("GroupViTVisionModel", "GroupViTVisionConfig", GROUPS, 4),
    "groupvit_whole": ("GroupViTModel", "GroupViTConfig", {"vision_config": GROUPS, "text_config": TEXT}, 4),
}  # fmt: skip
EACH = ("clip", "siglip", "dinov2_swiglu", "registers", "groupvit")


def make_tower(name: str, folder: Path | None = None) -> torch.nn.Module:
    """Transformers' model in evaluation mode; saved to the folder."""
    model, config, settings, _ = TOWERS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    if folder is not None:
        made.save_pretrained(folder)
    return made


def tower_of(model: torch.nn.Module) -> torch.nn.Module:
    """The tower inside it."""
    for part in ("vision_model", "dinov2"):
        model = getattr(model, part, model)
    return model

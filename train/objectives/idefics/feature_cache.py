"""Features of a frozen image encoder, kept on disk: later epochs skip the encoder.

One safetensors file an image, named by the digest of its pixels, in a folder named by the digest of the encoder's
configuration and weights: another encoder or another resolution never meets a file of this one. Files are written
under a temporary name and renamed, so ranks may share a folder, and a run that was killed leaves no half of one.

Legend: B sequences, N images a sequence, M images, S tokens of an encoded image, E image width.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ....models.idefics import IdeficsForVisionText2Text

FEATURES = "features"
# Images encoded at a time where they are not in the cache.
_BATCH = 64


class FeatureCache:
    """Encodes images with a model's frozen vision tower, each image once.

    Args:
        root: folder of the cache; made when first needed.
        model: its ``vision_model`` must be frozen.

    Attributes:
        hits, misses: images found and images encoded so far.

    Raises:
        ValueError: the vision tower trains.
    """

    def __init__(self, root: str | Path, model: IdeficsForVisionText2Text) -> None:
        tower = model.model.vision_model
        trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
        if trained:
            raise ValueError(
                f"model.feature_cache={root} needs a frozen vision tower, but {trained[0]} and "
                f"{len(trained) - 1} more of its weights train; set model.config.freeze_vision_layers=true with "
                "model.config.freeze_vision_module_exceptions=[], or leave model.feature_cache=null."
            )
        self.tower = tower
        self.folder = Path(root) / fingerprint(tower, model.config.vision_config.to_dict())
        self.hits = self.misses = 0

    @torch.no_grad()
    def __call__(self, pixels: Tensor, wanted: Tensor) -> Tensor:
        """Features [B, N, S, E] of pixel_values [B, N, 3, H, W]; zeros where ``wanted`` bool [B, N] is false."""
        places = wanted.flatten().nonzero().flatten().tolist()
        images = pixels.flatten(0, 1)
        features: dict[int, Tensor] = {}
        missing: list[tuple[int, Path]] = []
        for place in places:
            file = self.file_of(images[place])
            stored = self._read(file, pixels.device)
            if stored is None:
                missing.append((place, file))
            else:
                features[place] = stored
        self.hits, self.misses = self.hits + len(features), self.misses + len(missing)
        for start in range(0, len(missing), _BATCH):
            part = missing[start : start + _BATCH]
            states = self.tower(images[[place for place, _ in part]].to(self._dtype())).last_hidden_state
            for (place, file), state in zip(part, states, strict=True):
                features[place] = state
                _write(file, state)
        example = features[places[0]] if places else self._example(images[:1])
        out = example.new_zeros(len(images), *example.shape)
        if places:
            out[places] = torch.stack([features[place].to(out.dtype) for place in places])
        return out.view(*pixels.shape[:2], *example.shape)

    def file_of(self, image: Tensor) -> Path:
        """Where the features of an image [3, H, W] are, or would be."""
        content = image.detach().float().cpu().contiguous().numpy()
        digest = hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    @staticmethod
    def _read(file: Path, device: torch.device) -> Tensor | None:
        if not file.exists():
            return None
        try:
            return load_file(file, device=str(device))[FEATURES]
        except (SafetensorError, KeyError, OSError):  # damaged: encoded again, and overwritten
            return None

    def _dtype(self) -> torch.dtype:
        return next(self.tower.parameters()).dtype

    def _example(self, image: Tensor) -> Tensor:
        return self.tower(image.to(self._dtype())).last_hidden_state[0]


def fingerprint(tower: nn.Module, config: dict[str, object]) -> str:
    """Digest of an encoder: its configuration and every weight."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(file: Path, features: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({FEATURES: features.detach().cpu().contiguous()}, temporary)
    temporary.replace(file)

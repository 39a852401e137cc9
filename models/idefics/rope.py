"""Frequencies of rotary positions (Su et al. 2021) and the ways of stretching them to longer texts.

``rope_parameters`` holds ``rope_theta``, ``rope_type`` and what that type needs, by the names of Transformers:

- ``default``: theta ** (-2i / D);
- ``linear``: all divided by ``factor`` (Chen et al. 2023, position interpolation);
- ``dynamic``: theta grows once a text is longer than the model was trained on (NTK-aware scaling);
- ``llama3``: long waves divided by ``factor``, short ones kept, those between blended (Llama 3.1);
- ``yarn``: the same by the number of rotations in the trained length, and warmer cosines (Peng et al. 2023).

Legend: B batch, T tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

THETA = 10000.0
# Type to what it needs, beside what it may have.
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    # What a model was trained on says nothing of these two; newer files carry it all the same.
    "linear": ("original_max_position_embeddings",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
_WHERE = "rope_parameters (rope_scaling in earlier files)"


def check_rope(rope: Mapping[str, Any] | None) -> None:
    """
    Raises:
        ValueError: the type is not known, it lacks a number, or there is a setting that it does not have.
    """
    rope = rope or {}
    kind = rope.get("rope_type", "default")
    if kind not in NEEDED:
        raise ValueError(f"{_WHERE} asks for rope_type {kind!r}; known are {', '.join(NEEDED)}.")
    needed, optional = NEEDED[kind], _OPTIONAL.get(kind, ())
    others = {k for k, v in rope.items() if v is not None} - {"rope_type", "rope_theta", *needed, *optional}
    if rope.get("partial_rotary_factor") == 1.0:
        others.discard("partial_rotary_factor")
    if others:
        raise ValueError(
            f"{_WHERE} holds {', '.join(sorted(others))}, which rope_type {kind!r} does not have here; it has "
            f"{', '.join(('rope_theta', *needed, *optional))}."
        )
    wrong = [name for name in needed if not _positive(rope.get(name))]
    if rope.get("rope_theta") is not None and not _positive(rope["rope_theta"]):
        wrong.append("rope_theta")
    if wrong:
        raise ValueError(
            f"{_WHERE} has {', '.join(f'{name}={rope.get(name)!r}' for name in wrong)} for rope_type {kind!r}; give "
            "positive numbers."
        )
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(f"{_WHERE}: high_freq_factor must be above low_freq_factor for rope_type 'llama3'.")


def _positive(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def frequencies(rope: Mapping[str, Any] | None, head_dim: int, position_ids: Tensor) -> tuple[Tensor, float]:
    """Radians a token, float32 [D / 2], and what cosines and sines are multiplied by.

    Args:
        rope: as checked by :func:`check_rope`.
        position_ids: int [B, T]; ``dynamic`` follows the furthest.
    """
    rope = rope or {}
    kind = rope.get("rope_type", "default")
    theta: Any = float(rope.get("rope_theta") or THETA)
    if kind == "dynamic":
        trained, factor = rope["original_max_position_embeddings"], rope["factor"]
        length = (position_ids.max() + 1).clamp(min=trained)
        theta = theta * (factor * length / trained - (factor - 1)) ** (head_dim / (head_dim - 2))
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    plain = 1.0 / theta**exponent
    if kind == "linear":
        return plain / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, rope), 1.0
    if kind == "yarn":
        return _yarn(theta**exponent, theta, head_dim, rope), _warmth(rope)
    return plain, 1.0


def _llama3(plain: Tensor, rope: Mapping[str, Any]) -> Tensor:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the trained length
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / rope["factor"] + share * plain


def _yarn(waves: Tensor, theta: float, head_dim: int, rope: Mapping[str, Any]) -> Tensor:
    trained = rope["original_max_position_embeddings"]

    def place(turns: float) -> float:
        """Which pair of dimensions turns this often in the trained length."""
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = place(rope.get("beta_fast") or 32), place(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=waves.device)
    share = 1 - ((pairs - first) / (last - first)).clamp(0, 1)  # of the plain frequency
    return 1.0 / (rope["factor"] * waves) * (1 - share) + 1.0 / waves * share


def _warmth(rope: Mapping[str, Any]) -> float:
    """YaRN's factor of cosines and sines (its equation 22)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = rope["factor"]
    if factor <= 1:
        return 1.0
    log = 0.1 * math.log(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return (rope["mscale"] * log + 1.0) / (rope["mscale_all_dim"] * log + 1.0)
    return log + 1.0


def one_rope(values: dict[str, Any]) -> None:
    """Gather ``rope_theta`` and ``rope_scaling`` of earlier releases into ``rope_parameters``, which is checked.

    Raises:
        ValueError: they contradict each other.
    """
    scaling = values.pop("rope_scaling", None)
    theta = values.pop("rope_theta", None)
    if scaling is None and theta is None and values.get("rope_parameters") is None:
        return
    rope = {**(scaling or {}), **(values.get("rope_parameters") or {})}
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
        del rope["type"]
    if theta is not None and float(rope.setdefault("rope_theta", theta)) != float(theta):
        raise ValueError(
            f"config.json has rope_theta={theta!r} and rope_parameters with {rope['rope_theta']!r}; keep one of them."
        )
    values["rope_parameters"] = rope

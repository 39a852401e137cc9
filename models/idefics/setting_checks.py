"""Checks of single settings, shared by the configurations of IDEFICS and of its image towers."""

from __future__ import annotations

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{type(owner).__name__}.{name} is {value!r}; give a positive integer.",
        )


def probability(owner: object, name: str) -> None:
    value = getattr(owner, name)
    require(
        0.0 <= value < 1.0,
        f"{type(owner).__name__}.{name} is {value!r}; give a dropout probability in [0, 1).",
    )


def known(owner: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if name == "hidden_act" and callable(value):
        return  # an activation of the user's own, Tensor -> Tensor; it cannot be written to a file
    require(
        value in choices,
        f"{type(owner).__name__}.{name} is {value!r}; choose one of {', '.join(choices)}.",
    )


def non_negative(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, f"{type(owner).__name__}.{name} is {value!r}; give zero or more.")

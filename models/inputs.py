"""Ways of calling a model: keywords, one dictionary, or one list in argument order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def accepts_collections(*order: str) -> Callable[[Method], Method]:
    """Let a ``forward`` take its tensors as one dictionary or one list as well.

    Args:
        order: argument names in the order of a list, the first of them first.

    Raises (the decorated method):
        ValueError: unknown or repeated names, too many entries, or entries that are no tensors.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else kwargs.get(order[0])
            if not isinstance(first, Mapping | list | tuple):
                return method(self, *args, **kwargs)
            rest = {key: value for key, value in kwargs.items() if value is not first}
            if len(args) > 1:
                raise ValueError(
                    f"{type(self).__name__} was given a {type(first).__name__} of inputs and further "
                    "positional arguments; name the others by keyword."
                )
            return method(self, **unpack(type(self).__name__, first, order, rest))

        return call  # pyright: ignore[reportReturnType]

    return decorate


def unpack(
    owner: str,
    inputs: Mapping[str, Any] | list[Any] | tuple[Any, ...],
    order: tuple[str, ...],
    rest: dict[str, Any],
) -> dict[str, Any]:
    """Name the entries of a collection of inputs and join them with the keyword arguments ``rest``."""
    if isinstance(inputs, Mapping):
        named = {str(key): value for key, value in inputs.items()}
    else:
        if len(inputs) > len(order):
            raise ValueError(
                f"{owner} was given a list of {len(inputs)} inputs but takes at most {len(order)}, "
                f"in the order {', '.join(order)}."
            )
        wrong = next((v for v in inputs if v is not None and not isinstance(v, Tensor)), None)
        if wrong is not None:
            raise ValueError(
                f"{owner} was given a list holding a {type(wrong).__name__}; give tensors, in the order "
                f"{', '.join(order)}."
            )
        named = dict(zip(order, inputs, strict=False))
    repeated = sorted(named.keys() & rest.keys())
    if repeated:
        raise ValueError(
            f"{owner} was given {', '.join(repeated)} twice, in a collection and by keyword; choose one."
        )
    allowed = {*order, "return_loss", "output_attentions", "output_hidden_states", "output_segmentation"}
    unknown = sorted(named.keys() - allowed - {"return_dict"})
    if unknown:
        raise ValueError(
            f"{owner} was given unknown inputs {', '.join(unknown)}; it takes {', '.join(order)}."
        )
    return {**named, **rest}

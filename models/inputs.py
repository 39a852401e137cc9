"""Ways of calling a model: keywords, one dictionary, or one list in argument order; tensors or NumPy arrays.

And what processors hand to it: `BatchFeature`.
"""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])

RETURN_TENSORS = (None, "pt", "np")
_OPTIONS = {"return_loss", "return_dict", "output_attentions", "output_hidden_states", "output_segmentation"}


class BatchFeature(UserDict[str, Any]):
    """Dictionary of model inputs, also by attribute, that moves to a device or a type as one.

    Args:
        data: names to tensors, arrays or lists.
        tensor_type: ``"pt"`` or ``"np"`` to make tensors or arrays of lists.
    """

    def __init__(self, data: Mapping[str, Any] | None = None, tensor_type: str | None = None) -> None:
        super().__init__(data or {})
        if tensor_type is not None:
            self.convert_to_tensors(tensor_type)

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})
        if name not in data:
            raise AttributeError(name)
        return data[name]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move every tensor, and cast those of floating-point numbers: ids and masks stay what they are.

        Args:
            args, kwargs: a device, a dtype, or both, as ``Tensor.to`` takes them; ``non_blocking``.

        Raises:
            ValueError: something is neither a device nor a dtype.
        """
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        non_blocking = bool(kwargs.pop("non_blocking", False))
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, str | int | torch.device):
                device = value
            elif value is not None:
                raise ValueError(f"to() was given {value!r}; give a device, a dtype, or both.")
        if kwargs:
            raise ValueError(f"to() was given {', '.join(kwargs)}; it takes device, dtype and non_blocking.")

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                kind = dtype if dtype is not None and value.is_floating_point() else None
                return value.to(device=device, dtype=kind, non_blocking=non_blocking)
            return type(value)(move(v) for v in value) if isinstance(value, list | tuple) else value

        self.data = {name: move(value) for name, value in self.data.items()}
        return self

    def convert_to_tensors(self, tensor_type: str | None = None) -> Self:
        """Make tensors (``"pt"``) or arrays (``"np"``) of all values; None leaves them.

        Raises:
            ValueError: another kind is asked for, or rows differ in length.
        """
        check_return_tensors(tensor_type)
        if tensor_type is not None:
            self.data = {name: as_kind(value, tensor_type, name) for name, value in self.data.items()}
        return self


def check_return_tensors(kind: str | None) -> None:
    """
    Raises:
        ValueError: ``kind`` is none of ``RETURN_TENSORS``.
    """
    kind = getattr(kind, "value", kind)
    if kind in ("tf", "jax", "flax", "mlx"):
        raise ValueError(
            f"return_tensors={kind!r} is another framework's; these models are PyTorch: use 'pt', or 'np', whose "
            "arrays that framework takes."
        )
    if kind not in RETURN_TENSORS:
        raise ValueError(f"return_tensors={kind!r} is not known; use 'pt', 'np' or None for lists.")


def as_kind(values: Any, kind: str | None, name: str = "rows") -> Any:
    """Lists, arrays or tensors as a tensor (``"pt"``), an array (``"np"``) or lists (None).

    Raises:
        ValueError: rows of lists differ in length and cannot be one tensor.
    """
    import numpy as np

    kind = getattr(kind, "value", kind)
    if isinstance(values, Tensor):
        return values if kind == "pt" else values.numpy(force=True) if kind == "np" else values.tolist()
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values) if kind == "pt" else values if kind == "np" else values.tolist()
    if kind is None:
        return values
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
        values = [np.asarray(value) for value in values]
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.dtype == object:
        raise ValueError(
            f"{name} differ in length and cannot be one tensor; pass padding=True, and truncation=True where "
            "they are too long."
        )
    return torch.from_numpy(array) if kind == "pt" else array


def accepts_collections(*order: str) -> Callable[[Method], Method]:
    """Let a ``forward`` take its tensors as one dictionary or one list as well, and NumPy arrays as tensors.

    ``training=`` (of the TensorFlow classes) runs the call in that mode; ``token_type_ids=``, which some tokenizers
    make and no model here reads, is left out.

    Args:
        order: argument names in the order of a list, the first of them first.

    Raises (the decorated method):
        ValueError: unknown or repeated names, too many entries, or entries that are no tensors.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else kwargs.get(order[0])
            if isinstance(first, Mapping | list | tuple):
                rest = {key: value for key, value in kwargs.items() if value is not first}
                if len(args) > 1:
                    raise ValueError(
                        f"{type(self).__name__} was given a {type(first).__name__} of inputs and further "
                        "positional arguments; name the others by keyword."
                    )
                args, kwargs = (), unpack(type(self).__name__, first, order, rest)
            kwargs.pop("token_type_ids", None)
            training = kwargs.pop("training", None)
            if any(_is_array(value) for value in (*args, *kwargs.values())):
                args = tuple(tensor_of(self, value) for value in args)
                kwargs = {name: tensor_of(self, value) for name, value in kwargs.items()}
            if training is None or bool(training) == self.training:
                return method(self, *args, **kwargs)
            with _mode(self, bool(training)):
                return method(self, *args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return decorate


def tensor_of(model: Any, value: Any) -> Any:
    """A NumPy array as a tensor where ``model`` is, integers as int64; anything else as it is."""
    if not _is_array(value):
        return value
    tensor = torch.as_tensor(value.copy()).to(model.device)
    if tensor.dtype in (torch.int8, torch.int16, torch.int32):
        return tensor.long()
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _is_array(value: Any) -> bool:
    """Whether a value is a NumPy array; told without NumPy, which the models can do without."""
    return type(value).__module__ == "numpy" and hasattr(value, "__array_interface__")


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    was = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was)


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
        wrong = next(
            (v for v in inputs if v is not None and not isinstance(v, Tensor) and not _is_array(v)), None
        )
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
    unknown = sorted(named.keys() - {*order} - _OPTIONS - {"training", "token_type_ids"})
    if unknown:
        raise ValueError(
            f"{owner} was given unknown inputs {', '.join(unknown)}; it takes {', '.join(order)}."
        )
    return {**named, **rest}

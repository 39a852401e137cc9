"""What the models return: dataclasses that also behave as the dictionary and the tuple users know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def _with_keys(output: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], output.keys()


@dataclass
class ModelOutput:
    """Fields by attribute, by name (``out["loss"]``) or by position among the non-None ones (``out[0]``).

    Every subclass is a node of PyTorch's trees of tensors: ``torch.export``, ``torch.utils.checkpoint`` and the
    gathering of distributed wrappers see the tensors in it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), output.keys()),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_with_keys,
        )

    def keys(self) -> tuple[str, ...]:
        return tuple(f.name for f in fields(self) if self.__dict__[f.name] is not None)

    def values(self) -> tuple[Any, ...]:
        return tuple(self.__dict__[key] for key in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple((key, self.__dict__[key]) for key in self.keys())

    def get(self, key: str, default: Any = None) -> Any:
        return self.__dict__[key] if key in self.keys() else default

    def to_tuple(self) -> tuple[Any, ...]:
        """Values in field order without the None ones; nested outputs become tuples too."""
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return self.__dict__[key]
        return self.values()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.__dataclass_fields__:
            raise KeyError(f"{type(self).__name__} has no field {key!r}")
        setattr(self, key, value)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Output of one tower.

    Attributes:
        last_hidden_state: [B, T, C] after the final norm.
        pooler_output: [B, C], or [B, P] from `get_text_features` and `get_image_features`.
        hidden_states: input of every layer (text) or stage (vision) and the output of the last, before the
            norm.
        attentions: softmax weights [B, H, T, T] of each text layer, or soft assignments [B, G, N] of each
            grouping stage.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class FeatureOutput(BaseModelOutputWithPooling):
    """Tower output whose ``pooler_output`` went through the projector.

    Code written when these methods returned the tensor itself keeps working: torch functions, operators and
    tensor attributes act on ``pooler_output``.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "pooler_output" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["pooler_output"], name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, FeatureOutput):
                return value.pooler_output
            return type(value)(plain(v) for v in value) if type(value) in (list, tuple) else value

        return func(*plain(tuple(args)), **{k: plain(v) for k, v in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: FeatureOutput, *others: Any) -> Any:
        plain = [o.pooler_output if isinstance(o, FeatureOutput) else o for o in others]
        return getattr(self.pooler_output, name)(*plain)

    return apply


# Python looks for an operator on the class, where ``__getattr__`` has no say.
for _name in (
    *(f"__{side}{op}__" for op in ("add", "sub", "mul", "truediv", "matmul", "pow") for side in ("", "r")),
    *(f"__{op}__" for op in ("neg", "abs", "lt", "le", "gt", "ge", "array", "float", "int")),
):
    setattr(FeatureOutput, _name, _operator(_name))

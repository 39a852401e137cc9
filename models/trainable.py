"""What trainers and adapter libraries ask of a model: its parameters counted, recomputation, frozen inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

# Ways of computing attention whose results are what these models compute.
_ATTENTION = (None, "sdpa", "eager", "kernels")


def check_attention(name: Any) -> None:
    """Raise ValueError for a way of computing attention that is not known."""
    if name not in _ATTENTION:
        raise ValueError(
            f"attn_implementation={name!r} is not known; attention here is PyTorch's own and the fused kernels: "
            "leave it out, or give 'sdpa'."
        )


class TrainableModel(nn.Module):
    """Answers under the names that Transformers' ``Trainer`` and ``peft`` use.

    Subclasses name the modules that can recompute their activations in `recomputing`, and their token tables in
    ``get_input_embeddings``.
    """

    main_input_name: ClassVar[str] = "input_ids"
    base_model_prefix: ClassVar[str] = ""
    supports_gradient_checkpointing: ClassVar[bool] = False
    is_parallelizable: ClassVar[bool] = False
    framework: ClassVar[str] = "pt"

    config: Any

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def vocab_size(self) -> int:
        """Tokens of the text model's base vocabulary.

        Raises:
            AttributeError: the model reads no text.
        """
        return getattr(self.config, "text_config", self.config).vocab_size

    @property
    def base_model(self) -> nn.Module:
        """The model below the head, or this one."""
        return getattr(self, self.base_model_prefix) if self.base_model_prefix else self

    @classmethod
    def can_generate(cls) -> bool:
        return hasattr(cls, "generate")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights, shared ones counted once; ``exclude_embeddings`` leaves tables looked up by id out."""
        left_out = (
            {id(p) for table in self._tables() for p in table.parameters()} if exclude_embeddings else set()
        )
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def _tables(self) -> list[nn.Module]:
        tables: list[nn.Module] = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        own = self.get_input_embeddings()
        return tables if own is None else [*tables, own]

    def get_input_embeddings(self) -> nn.Module | None:
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, and of the buffers unless they are left out."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """Tokens of a batch, for counting operations."""
        value = input_dict.get(self.main_input_name)
        return value.numel() if isinstance(value, Tensor) else 0

    def floating_point_ops(self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True) -> int:
        """Six operations a weight and token (Kaplan et al. 2020, section 2.1): what a trainer's log shows."""
        return (
            6 * self.estimate_tokens(input_dict) * self.num_parameters(exclude_embeddings=exclude_embeddings)
        )

    def recomputing(self) -> list[nn.Module]:
        """Modules with a switch ``gradient_checkpointing``."""
        return [module for module in self.modules() if hasattr(module, "gradient_checkpointing")]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(bool(module.gradient_checkpointing) for module in self.recomputing())

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **further: Any
    ) -> None:
        """Recompute activations in backward, layer by layer, instead of keeping them.

        Args:
            gradient_checkpointing_kwargs: of ``torch.utils.checkpoint``; ``use_reentrant=True`` is answered with a
                warning, for gradients would stop at frozen inputs: results are those of False.
            further: ``every_n_layers=1`` and ``offload=False`` of newer trainers, which change nothing.

        Raises:
            ValueError: another way of recomputing is asked for, or the model has none.
        """
        asked = dict(gradient_checkpointing_kwargs or {})
        if asked.pop("use_reentrant", False):
            warnings.warn(
                "use_reentrant=True would stop gradients at frozen inputs; activations are recomputed without it.",
                stacklevel=2,
            )
        asked.update({k: v for k, v in further.items() if v and (k, v) != ("every_n_layers", 1)})
        if asked:
            raise ValueError(
                f"gradient_checkpointing_enable was given {', '.join(map(str, asked))}; every layer is recomputed, and "
                "use_reentrant=False is the only other option."
            )
        if not self.recomputing():
            raise ValueError(
                f"{type(self).__name__} does not support gradient checkpointing; leave it off, or use smaller "
                "batches."
            )
        for module in self.recomputing():
            module.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]

    def follow_settings(self) -> None:
        """Recompute activations if the configuration says so; models call it at the end of their construction."""
        if getattr(self.config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()

    def set_attn_implementation(self, attn_implementation: Any) -> None:
        """Take a name `from_pretrained` takes, or a dictionary of one for each part; results are the same.

        Raises:
            ValueError: a name is not known.
        """
        several = isinstance(attn_implementation, Mapping)
        for name in attn_implementation.values() if several else (attn_implementation,):
            check_attention(name)

    def gradient_checkpointing_disable(self) -> None:
        for module in self.recomputing():
            module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]

    # Their names in Transformers from 5.23 on.
    is_activation_checkpointing = is_gradient_checkpointing
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def enable_input_require_grads(self) -> None:
        """Let the embedded tokens require gradients, so that adapters train behind a frozen table."""
        table = self.get_input_embeddings()
        if table is not None:
            self._grad_hook = table.register_forward_hook(lambda _, __, output: output.requires_grad_(True))

    def disable_input_require_grads(self) -> None:
        hook = self.__dict__.pop("_grad_hook", None)
        if hook is not None:
            hook.remove()

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Self:
        """A new model; ``dtype`` (or ``torch_dtype``) is the type of its weights."""
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        model = cls(config)
        return model if dtype is None else model.to(dtype)


def resized_rows(
    old: Tensor | None, base: Tensor, count: int, deviation: float | None = None
) -> nn.Parameter:
    """Rows [count, C] that keep those of ``old``; further ones start at the mean of the ``base`` rows, or are drawn
    with a ``deviation``.
    """
    with torch.no_grad():
        rows = base.float().mean(0).to(base.dtype).repeat(count, 1)
        if deviation is not None:
            rows.normal_(std=deviation)
        if old is not None:
            kept = min(count, len(old))
            rows[:kept] = old[:kept]
    return nn.Parameter(rows)

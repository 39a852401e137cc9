"""What a ``config.json`` says beside the fields of ours: settings that would change the model, and the rest.

A file may come from another release, a fork or a relative of a model. A setting that would make its layers compute
something else must not be dropped, or the weights load and the results are wrong. `refused` finds those, by a table
that each configuration class brings (``fixed``: what the model computes with) and by the words such settings are
made of; everything else is kept by the configuration as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Fixed = Mapping[str, Callable[[Any], Iterable[Any]]]

# Words in the names of settings that change what a layer computes. Values that switch such a thing off are fine.
_ALTERING = re.compile(
    r"(^|_)(rope|rotary|alibi|mrope|yarn|window|chunk_attention|softcap|softcapping|experts?|moe|multiplier|scaling|"
    r"kv|biases|bias|quantization|quantized|pruned|layerdrop|dropout|layer_types|parallel_attn|parallel_residual|"
    r"qk_norm|norm_type|normalization|mamba|sparse|sparsity|sinks?|mtp|adapter)(_|$)|layernorm"
)
# Names with such a word that change nothing: the heads of other models, training outside the model, and the dropouts of
# BERT's configuration, which no release of these models reads.
_HARMLESS = frozenset(
    {
        "attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob", "initializer_scaling",
        "summary_first_dropout",
    }
)  # fmt: skip
_OFF = (None, False, 0, 0.0, "", "none", "None", [], {}, ())


def refused(owner: Any, fixed: Fixed, settings: Mapping[str, Any]) -> list[str]:
    """The settings that ask for another model than ``owner`` describes, each as a phrase.

    Args:
        owner: the configuration, all its own fields set.
        fixed: name to the values that mean what the model does anyway; null always does.
        settings: what the file holds beside the fields of ``owner``.
    """
    found = []
    for name, value in settings.items():
        if name in fixed:
            allowed = [value for value in fixed[name](owner) if value is not None]
            if value is not None and not any(_same(value, item) for item in allowed):
                found.append(f"{name}={value!r} (it has {' or '.join(map(repr, allowed)) or 'none'})")
        elif name not in _HARMLESS and _ALTERING.search(name) and not _is_off(name, value):
            found.append(f"{name}={value!r} (it has no such thing)")
    return found


def _is_off(name: str, value: Any) -> bool:
    return any(_same(value, item) for item in _OFF) or (
        re.search(r"multiplier|scaling", name) is not None and _same(value, 1.0)
    )


def _same(value: Any, other: Any) -> bool:
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(other, numbers):
        return float(value) == float(other)
    return type(value) is type(other) and value == other

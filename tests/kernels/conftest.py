"""What every kernel test runs under: a truthful interpreter, and memory that shows if it was not written."""

from collections.abc import Iterator

import pytest
import torch
from interloom.kernels.bench.interpreter import patched_interpreter


@pytest.fixture(scope="session", autouse=True)
def interpreted() -> Iterator[None]:
    """Mend bfloat16 in Triton's interpreter; arithmetic on bfloat16 tiles raises."""
    with patched_interpreter(forbid_bf16_math=True):
        yield


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` and its relatives return NaN (or the largest integer): what is not written shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, _make=original, **kwargs: _poison(_make(*args, **kwargs))
        )

"""What every kernel test runs under: a truthful interpreter, and memory that shows if it was not written."""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from interloom.kernels.bench.interpreter import patched_interpreter
from interloom.kernels.bench.machine import poisoned_empty as poisoned

# For a second and a third Triton: --hypothesis-profile=brief. Tests take the fewer of this and their own number.
settings.register_profile("brief", max_examples=3)


@pytest.fixture(scope="session", autouse=True)
def interpreted() -> Iterator[None]:
    """Mend bfloat16 in Triton's interpreter; arithmetic on bfloat16 tiles raises."""
    with patched_interpreter(forbid_bf16_math=True):
        yield


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """``torch.empty`` and its relatives return NaN (or the largest integer): what is not written shows."""
    with poisoned():
        yield

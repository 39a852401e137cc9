"""Settings every test needs before Triton or torch is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# A machine with a GPU may have nothing of ours installed: the tests of kernels run from the bare checkout.
if importlib.util.find_spec("interloom") is None:
    _BARE = str(Path(__file__).with_name("bare"))
    sys.path.insert(0, _BARE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_BARE, os.environ.get("PYTHONPATH"))))

# Triton decides when a kernel is *defined* whether it is interpreted, so this must precede every import.
# The compiled-code checks run in processes of their own with the variable removed.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if TYPE_CHECKING:
    from .tiny import TinyWorld

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run wherever there is one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; run make test-gpu on a machine with one"))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A few pictures of squares, a tokenizer of words, and the overrides of a model that trains on them in seconds."""
    from .tiny import make_world  # needs more than a bare machine has

    return make_world(tmp_path_factory.mktemp("tiny_world"))


@pytest.fixture(scope="session")
def fork_ranks() -> Callable[..., None]:
    """:func:`tests.tiny.fork_ranks`."""
    from .tiny import fork_ranks

    return fork_ranks

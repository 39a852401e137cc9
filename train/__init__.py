"""Training and evaluation. From Python, without the command line::

    from interloom.train import compose_config, evaluate, fit, load, segment

    config = compose_config(["experiment=groupvit_demo", "trainer.max_steps=200"])
    run = fit(config)
    evaluate(run, "retrieval", data="data/demo")
    segment("photo.jpg", ["cat", "dog"], checkpoint=run).save("overlay.png")

The names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.lazy import lazy_exports

if TYPE_CHECKING:
    from .commands.python import (
        Segmentation as Segmentation,
    )
    from .commands.python import (
        build_loader as build_loader,
    )
    from .commands.python import (
        compose_config as compose_config,
    )
    from .commands.python import (
        evaluate as evaluate,
    )
    from .commands.python import (
        fit as fit,
    )
    from .commands.python import (
        load as load,
    )
    from .commands.python import (
        segment as segment,
    )

__all__ = ["Segmentation", "build_loader", "compose_config", "evaluate", "fit", "load", "segment"]

__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, ".commands.python"))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What a checkpoint of a run holds beside the weights, and how a run goes on from it."""

from __future__ import annotations

from typing import Any

import torch

from ..data.order import check_fingerprint
from ..optim.adamw import parameter_groups
from ..optim.averages import AVERAGE
from ..optim.state import managed_parameters, named_state, numbered_state, parameter_names
from ..parallel.ranks import say
from .frozen_base import FrozenBase, base_names
from .resumed_state import check_resumed

STATE_KEY = "interloom"
BASE = "base"
FORMAT = 1
# Steps that changed nothing, by reason: a resumed run counts on, and gives up after as many in a row.
COUNTS = ("nonfinite_steps", "nonfinite_in_a_row", "empty_steps")


def add_contents(module: Any, checkpoint: dict[str, Any]) -> None:
    """Put this trainer's own part into a checkpoint of Lightning's.

    Args:
        module: the training module.
        checkpoint: plain values and tensors only are added, as it is loaded with ``weights_only``.
    """
    checkpoint[STATE_KEY] = {
        "format": FORMAT,
        "seed": module.seed,
        "step": module.trainer.global_step,
        "global_batch": module.global_batch,
        "fingerprint": module.fingerprint,
        "run_id": module.run_id,
        "counts": {name: getattr(module, name) for name in COUNTS},
        "steering": module.steering.state(),
        **module.description(),
    }
    if module.base is not None:
        left_out = base_names(module)
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if name not in left_out}
        checkpoint[STATE_KEY][BASE] = module.base.to_dict()
    if module.average is not None:
        checkpoint[AVERAGE] = module.average.state()
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, torch.optim.Optimizer)
    # By name: another strategy numbers the parameters otherwise.
    names = parameter_names(module, managed_parameters(optimizer))
    checkpoint["optimizer_states"] = [named_state(s, names) for s in checkpoint["optimizer_states"]]


def restore_contents(module: Any, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to this run, and take over what it counts and averages.

    Raises:
        ValueError: it is another trainer's, another run's or another model's.
    """
    saved = checkpoint.get(STATE_KEY)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(
            "ckpt_path is not a checkpoint of this trainer; to start from its weights alone give it as "
            "model.init_checkpoint."
        )
    family = module.description()["family"]
    if saved["family"] != family:
        raise ValueError(
            f"ckpt_path holds a {saved['family']} run but the experiment trains {family}; choose the experiment that "
            "the checkpoint came from."
        )
    if saved["seed"] != module.seed or saved["global_batch"] != module.global_batch:
        raise ValueError(
            f"the checkpoint was made with seed={saved['seed']} and a global batch of {saved['global_batch']}, "
            f"this run has seed={module.seed} and {module.global_batch}; resume with the same, or start from its "
            "weights with model.init_checkpoint."
        )
    check_resumed(checkpoint, saved, module.trainer_config.max_steps)
    check_fingerprint(saved["fingerprint"], module.fingerprint)
    _check_base(module, saved.get(BASE))
    _check_shapes(module, checkpoint["state_dict"])
    for name in COUNTS:
        setattr(module, name, saved.get("counts", {}).get(name, 0))
    module.steering.resume(saved.get("steering"), saved["step"])
    _restore_average(module, checkpoint.get(AVERAGE), saved["step"])
    # Numbered as the optimiser of this run numbers its parameters, whatever strategy wrote them.
    optimizer = module.configure_optimizers()
    whole = [p for group in parameter_groups([module], 1.0) for p in group["params"]]  # type: ignore[union-attr]
    names = parameter_names(module, whole)
    checkpoint["optimizer_states"] = [
        numbered_state(named_state(state, names), module, optimizer)
        for state in checkpoint["optimizer_states"]
    ]


def _check_base(module: Any, saved: Any) -> None:
    """That the weights which the checkpoint leaves out are those of this run."""
    if (saved is None) != (module.base is None):
        there, here = ("without", "with") if saved is None else ("with", "without")
        raise ValueError(
            f"the checkpoint was made {there} quantised weights and this run is {here} (model.quantize); resume with "
            "the model settings it was made with."
        )
    if module.base is None:
        return
    base = FrozenBase.from_dict(saved, "ckpt_path")
    if (base.storage, base.modules, base.narrowed) != (
        module.base.storage,
        module.base.modules,
        module.base.narrowed,
    ):
        raise ValueError(
            "the checkpoint's frozen weights are stored in another way than this run's (model.quantize, "
            "model.quantization, model.frozen_dtype); resume with the model settings it was made with."
        )
    base.check(module.base, "ckpt_path")
    # The weights that are not in it stay as they were built.
    module.strict_loading = False


def _check_shapes(module: Any, weights: dict[str, Any]) -> None:
    left_out = set() if module.base is None else base_names(module)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    own = {name: tuple(value.shape) for name, value in module.state_dict().items() if name not in left_out}
    odd = sorted(name for name in {*shapes, *own} if shapes.get(name) != own.get(name))
    if odd:
        raise ValueError(
            f"the checkpoint's weights do not fit the model of this run ({', '.join(odd[:3])}"
            f"{' …' if len(odd) > 3 else ''}); resume with the model settings it was made with."
        )


def _restore_average(module: Any, saved: dict[str, Any] | None, step: int) -> None:
    """Go on with the checkpoint's average of the weights, or say that this run does not."""
    if module.average is not None and saved is not None:
        module.average.resume(module, saved)
    elif module.average is not None:
        say(f"the checkpoint holds no averaged weights; their average begins at step {step}.")
    elif saved is not None:
        say(
            "WARNING: the checkpoint's averaged weights are left behind, as optim.ema_decay is null here; set it "
            "to go on with them."
        )

"""What the LightningModules of both objectives share: one ``training_step`` is one optimiser step."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...models.received import blaming
from ..checkpointing.adapter_folder import AdapterExport
from ..checkpointing.contents import add_contents, restore_contents
from ..checkpointing.frozen_base import FrozenBase
from ..checkpointing.monitored import Steering
from ..config import OptimConfig, TrainerConfig
from ..messages import tell
from ..optim.adamw import adamw, learning_rate, parameter_groups, set_learning_rate
from ..optim.averages import WeightAverage, copy_whole
from ..optim.clipping import clip_gradients
from ..parallel.gradients import average_gradients
from ..parallel.ranks import agree, gathered, ranks
from ..parallel.sharding import Sharder, reduce_now, sharded
from ..parallel.stop_requests import StopRequests
from ..strategies import ShardedStrategy
from .randomness import step_noise


class TrainingModule(LightningModule):
    """Optimisation, clipping, schedules and checkpoint contents; a subclass adds the model and its objective.

    The loader yields a rank's whole share of one optimiser step; :meth:`backward_step` splits it into
    micro-batches as it likes and leaves its part of the gradient of the global batch's loss in ``.grad``: parts
    are averaged over ranks, so each is the derivative times the number of ranks. ``trainer.global_step`` is the
    only state of data and randomness.

    Args:
        model: the module that is trained and exported.
        optim, trainer_config: the groups ``optim`` and ``trainer`` of the run.
        seed: run seed.
        global_batch: samples of one optimiser step over all ranks.
        fingerprint: what the meaning of a step depends on (the data plan's).
        transform: applied to each batch on the device: augmentation, normalisation.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optim: OptimConfig,
        trainer_config: TrainerConfig,
        seed: int,
        global_batch: int,
        fingerprint: dict[str, Any],
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optim_config = optim
        self.trainer_config = trainer_config
        self.seed = seed
        self.global_batch = global_batch
        self.fingerprint = fingerprint
        # Names the run and, in loggers that know runs, its record there; None outside a run.
        self.run_id: str | None = None
        self.transform = transform
        # Where steps without a finite gradient are written down, one JSON object a line; None: nowhere.
        self.skipped_steps: Path | None = None
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0
        # Set by a step whose global batch holds nothing to learn from (every label masked).
        self.nothing_to_learn = False
        # Whether this step's gradients had a loss scale in them, which is taken out.
        self.unscaled = False
        self.stop_requests = StopRequests()  # that of the whole run once `fit` has set it
        self.empty_steps = 0
        # Weights that checkpoints leave out, where a family sets it.
        self.base: FrozenBase | None = None
        self.steering = Steering()  # that of the whole run once `fit` has set it
        self.average = None if optim.ema_decay is None else WeightAverage(optim.ema_decay)

    @abstractmethod
    def backward_step(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Leave this rank's part of the step's gradient in ``.grad``; return metrics, ``loss`` among them."""

    @abstractmethod
    def shard(self, sharder: Sharder) -> None:
        """Cut the module up over ranks, in place."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Plain values from which the model can be built again: ``family``, ``config``, ``processor``."""

    def full_weights(self) -> dict[str, Tensor] | None:
        """The model's state dict, averages in place of weights where they are kept, gathered from shards on rank 0.

        None where the model's own state dict is just that. Every rank must call it.
        """
        self.begin_average()
        if self.average is None and not sharded(self.model.parameters()):
            return None
        state: dict[str, Tensor] = dict(self.model.state_dict())
        if self.average is not None:
            prefix = "model."
            state |= {
                name.removeprefix(prefix): tensor
                for name, tensor in self.average.tensors.items()
                if name.startswith(prefix)
            }
        weights: dict[str, Tensor] = {}
        for name, tensor in state.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks()[0] != 0:
                continue
            if whole is not tensor:  # gathering rounds the rows up to a multiple of the ranks
                whole = torch.empty_like(whole, device="cpu").copy_(whole)
            weights[name] = whole.cpu()
        return weights

    def export_state_dict(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights that ``save_pretrained`` writes, under the model's own names.

        ``weights`` are those of :meth:`full_weights`.
        """
        return self.model.state_dict() if weights is None else weights

    def export_adapters(self, weights: dict[str, Tensor] | None = None) -> AdapterExport | None:
        """What is written in the place of the model where the run exports adapters alone; None: the model is."""
        return None

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy) and not sharded(self.parameters()):
            self.shard(strategy.sharder())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups([self], self.optim_config.weight_decay)
        if not groups:
            raise ValueError("every parameter is frozen; leave something to train.")
        return adamw(groups, self.optim_config)

    def on_train_start(self) -> None:
        self.begin_average()

    def begin_average(self) -> None:
        """Begin the average of the weights, if one is wanted. Every rank must call it."""
        if self.average is not None:
            strategy = self.trainer.strategy
            self.average.begin(self, strategy.fill if isinstance(strategy, ShardedStrategy) else copy_whole)

    def reduce_gradients(self, last: bool) -> None:
        """Called before each backward pass of a step; ``last`` for the last one.

        Shards are reduced in every pass, so that no rank ever holds the whole gradient, unless
        ``trainer.reduce_every_pass`` is false.
        """
        reduce_now(self, last or self.trainer_config.reduce_every_pass)

    def skip_step(self, batch: dict[str, Any], step: int, **values: Tensor) -> None:
        """Count a step whose loss or gradient is not finite; the optimiser will change nothing.

        Rank 0 writes down the samples of all ranks, and this rank's ``values``. Every rank must call it.

        Raises:
            ValueError: too many of them in a row.
        """
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        own = {"step": step, "rank": ranks()[0], "keys": list(batch.get("keys", ()))}
        everyone = gathered({**own, **{name: repr(float(value.detach())) for name, value in values.items()}})
        if self.skipped_steps is not None and everyone:
            lines = "".join(json.dumps(entry) + "\n" for entry in everyone)
            try:
                with open(self.skipped_steps, "a", encoding="utf-8") as file:
                    file.write(lines)
            except OSError as error:  # a full disk
                tell(f"WARNING: {self.skipped_steps} cannot be written ({error}):\n{lines}")
        if self.nonfinite_in_a_row >= self.trainer_config.nonfinite_limit:
            raise ValueError(
                f"the loss or the gradient was not finite for {self.nonfinite_in_a_row} steps in a row, up to step "
                f"{step}; {self.skipped_steps or 'the run directory'} names their samples. Lower optim.lr, or use "
                "trainer.precision=32-true."
            )

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        # Lightning would walk through every caption and noun in search of tensors.
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        # Before the step, hence in float32 whatever the precision of the step.
        return batch if self.transform is None else self.transform(batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        step = self.trainer.global_step
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        metrics = self.backward_step(batch, step)
        average_gradients(self.parameters())
        rate = learning_rate(self.optim_config, step, self.trainer_config.max_steps, self.global_batch)
        set_learning_rate(optimizer.optimizer, rate)
        if self.nothing_to_learn:
            # The step counts, but without gradients the optimiser changes nothing, weight decay included.
            optimizer.zero_grad(set_to_none=True)
            self.empty_steps += 1
        metrics["empty_steps"] = torch.tensor(float(self.empty_steps))
        metrics["grad_norm"] = self.clip()
        finite, self.stop_requests.agreed = agree(
            torch.isfinite(metrics["loss"]) & torch.isfinite(metrics["grad_norm"]), self.stop_requests.asked
        )
        if not finite:
            self.skip_step(batch, step, loss=metrics["loss"], grad_norm=metrics["grad_norm"])
            optimizer.zero_grad(set_to_none=True)
        else:
            self.nonfinite_in_a_row = 0
        metrics["nonfinite_steps"] = torch.tensor(float(self.nonfinite_steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.average is not None and finite and not self.nothing_to_learn:
            self.average.update()
        metrics["lr"] = torch.tensor(rate)
        self.log_dict({f"train/{name}": value.detach() for name, value in metrics.items()}, logger=False)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # A step runs under autocast; operations with a backward of their own must not be cast in it again.
        with torch.autocast(loss.device.type, enabled=False):
            super().manual_backward(loss, *args, **kwargs)

    def clip(self) -> Tensor:
        """Clip the gradient to ``optim.clip_norm``; return its norm before."""
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.unscaled = scaler is not None and bool(parameters)
        if self.unscaled:  # float16: the norm is that of the gradient itself
            scaler.unscale_(self.optimizers().optimizer)  # type: ignore[union-attr]
        return clip_gradients(parameters, self.optim_config.clip_norm)

    def noise(self, step: int, row_offset: int) -> Any:
        """The noise of this step for samples from global index ``row_offset`` on."""
        return step_noise(self.seed, step, row_offset, self.device)

    def micro_batches(self, size: int) -> Iterator[slice]:
        """Slices of at most ``micro_batch_size`` rows that cover a share of ``size`` rows."""
        length = self.trainer_config.micro_batch_size or size
        for start in range(0, size, length):
            yield slice(start, min(start + length, size))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        add_contents(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with blaming("ckpt_path", "give the checkpoint before it"):
            restore_contents(self, checkpoint)

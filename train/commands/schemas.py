"""The dataclasses that check Hydra's configuration."""

from __future__ import annotations

from ..config import CallbacksConfig, EvalConfig, LoggerConfig, OptimConfig, TrainConfig, TrainerConfig


def register_schemas() -> None:
    """Tell Hydra the schemas. ``conf/<group>/*.yaml`` begin their defaults with the one of their group."""
    from hydra.core.config_store import ConfigStore

    from ..data.documents.dataset import DocumentsConfig
    from ..data.pairs.dataset import PairsConfig
    from ..objectives.groupvit.config import GroupViTTrainConfig
    from ..objectives.idefics.config import IdeficsTrainConfig

    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="eval_schema", node=EvalConfig)
    store.store(group="optim", name="optim_schema", node=OptimConfig)
    store.store(group="trainer", name="trainer_schema", node=TrainerConfig)
    store.store(group="callbacks", name="callbacks_schema", node=CallbacksConfig)
    store.store(group="logger", name="logger_schema", node=LoggerConfig)
    store.store(group="model", name="groupvit_schema", node=GroupViTTrainConfig)
    store.store(group="model", name="idefics_schema", node=IdeficsTrainConfig)
    store.store(group="data", name="pairs_schema", node=PairsConfig)
    store.store(group="data", name="documents_schema", node=DocumentsConfig)

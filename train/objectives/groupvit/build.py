"""How a GroupViT run is put together from its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ....models.groupvit import GroupViTImageProcessor, GroupViTProcessor, GroupViTTokenizer
from ...checkpointing.load import load_processor, own_images
from ...config import TrainConfig
from ...data.pairs.dataset import PairsConfig, PairsTransform, pairs_loader
from ...data.pairs.vocabulary import CHECKED_CAPTIONS, captions_of, check_captions, has_unknown_token
from ...data.shards.made_by import how_to_make
from ...data.shards.reader import ShardSet
from ...evaluation.tasks import check_task_fits
from ...messages import tell
from ..own_parts import OwnParts
from .config import GroupViTTrainConfig
from .objective import GroupViTModule


def build_loader(config: TrainConfig, *, rank: int, world_size: int) -> Any:
    """The loader of the run's pairs."""
    if not isinstance(config.data, PairsConfig):
        raise ValueError(
            "a GroupViT trains on image-caption pairs; choose data=pairs or a config made from it."
        )
    check_task_fits(config.task, config.data.train)
    loader = pairs_loader(
        config.data, seed=config.seed, rank=rank, world_size=world_size, max_steps=config.trainer.max_steps
    )
    assert isinstance(config.model, GroupViTTrainConfig)
    if rank == 0:
        check_words(config.model, config.data)
        if config.data.val and not config.callbacks.validates_every(config.trainer.max_steps):
            tell(
                "data.val is given and nothing reads it: set callbacks.validation.every_steps, or "
                "callbacks.checkpoint.monitor=val/loss."
            )
    return loader


def check_words(config: GroupViTTrainConfig, data: PairsConfig) -> None:
    """Warn of captions whose words the tokenizer does not know.

    Raises:
        ValueError: they are too many to learn anything.
    """
    tokenizer = build_processor(config, data).tokenizer
    if not has_unknown_token(tokenizer):
        return
    shards = ShardSet.open(data.train, kind="pairs", max_skip_rate=data.max_skip_rate)
    captions = list(captions_of(shards, CHECKED_CAPTIONS))
    if warning := check_captions(tokenizer, captions, str(config.tokenizer or config.init_checkpoint)):
        tell(warning)


def build_module(
    config: TrainConfig, *, fingerprint: dict[str, Any], own: OwnParts | None = None
) -> GroupViTModule:
    """The LightningModule, with weights drawn or loaded; ``own`` are the user's parts of it."""
    own = own or OwnParts()
    assert isinstance(config.model, GroupViTTrainConfig)
    assert isinstance(config.data, PairsConfig)
    return (own.objective or GroupViTModule)(
        config.model,
        build_processor(config.model, config.data),
        transform=PairsTransform(config.data, seed=config.seed, extra=list(own.augment.values())),
        optim=config.optim,
        trainer_config=config.trainer,
        seed=config.seed,
        global_batch=config.data.batch_size,
        fingerprint=fingerprint,
    )


def build_processor(config: GroupViTTrainConfig, data: PairsConfig) -> GroupViTProcessor:
    """The tokenizer the run is told of, with the image settings of its data.

    Raises:
        FileNotFoundError: there is no such tokenizer.
        ValueError: none is named, or the model is not made for its vocabulary.
    """
    source = config.tokenizer or config.init_checkpoint
    if source is None:
        raise ValueError("model.tokenizer is not set; give a folder with tokenizer.json.")
    if config.tokenizer is None:
        tokenizer = load_processor(source).tokenizer
    elif not Path(source).exists():
        raise FileNotFoundError(
            f"model.tokenizer={source} does not exist; {how_to_make(source) or 'give a folder with tokenizer.json'}."
        )
    else:
        tokenizer = GroupViTTokenizer.from_pretrained(source)
    text = config.model_config().text_config
    if tokenizer.vocab_size > text.vocab_size or tokenizer.eos_token_id != text.eos_token_id:
        raise ValueError(
            f"the tokenizer {source} has {tokenizer.vocab_size} tokens and end token {tokenizer.eos_token_id}, the "
            f"model is made for vocab_size={text.vocab_size} and eos_token_id={text.eos_token_id}; set both in "
            "model.config.text_config."
        )
    tokenizer.model_max_length = min(
        tokenizer.model_max_length or text.max_position_embeddings, text.max_position_embeddings
    )
    square = {"height": data.image_size, "width": data.image_size}
    images = replace(
        own_images(config.init_checkpoint) or GroupViTImageProcessor(),
        size=square if data.fit == "stretch" else {"shortest_edge": data.image_size},
        do_center_crop=data.fit != "stretch",
        crop_size=square,
        image_mean=list(data.mean),
        image_std=list(data.std),
        resample=data.resample,
    )
    return GroupViTProcessor(images, tokenizer)

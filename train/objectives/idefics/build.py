"""How an IDEFICS run is put together from its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ....models.idefics import IdeficsImageProcessor, IdeficsProcessor, IdeficsTokenizer
from ...callbacks.samples import Prompt, SamplesCallback, prompts
from ...checkpointing.load import locate, processor_of
from ...config import TrainConfig
from ...data.documents.dataset import DocumentsConfig, DocumentsTransform, documents_loader
from ...data.shards.made_by import how_to_make
from ...evaluation.tasks import check_task_fits
from ..own_parts import OwnParts
from .config import IdeficsTrainConfig
from .objective import IdeficsModule


def build_loader(config: TrainConfig, *, rank: int, world_size: int) -> Any:
    """The loader of the run's documents."""
    if not isinstance(config.data, DocumentsConfig):
        raise ValueError(
            "an IDEFICS trains on interleaved documents; choose data=documents or a config made from it."
        )
    check_task_fits(config.task, [folder for folders in config.data.sources.values() for folder in folders])
    return documents_loader(
        config.data, seed=config.seed, rank=rank, world_size=world_size, max_steps=config.trainer.max_steps
    )


def build_module(
    config: TrainConfig, *, fingerprint: dict[str, Any], own: OwnParts | None = None
) -> IdeficsModule:
    """The LightningModule, with weights drawn or loaded; ``own`` are the user's parts of it."""
    assert isinstance(config.model, IdeficsTrainConfig)
    assert isinstance(config.data, DocumentsConfig)
    if config.model.frozen_dtype != "float32" and "mixed" not in config.trainer.precision:
        raise ValueError(
            f"model.frozen_dtype={config.model.frozen_dtype} needs trainer.precision=bf16-mixed, "
            f"not {config.trainer.precision}; or leave model.frozen_dtype=float32."
        )
    if config.model.feature_cache and config.data.crop_scale is not None:
        raise ValueError(
            f"model.feature_cache={config.model.feature_cache} is of no use while every epoch crops images "
            "elsewhere; set data.crop_scale=null, or leave model.feature_cache=null."
        )
    if config.model.feature_cache and config.trainer.strategy == "fsdp2":
        raise ValueError(
            "model.feature_cache needs the whole encoder on every rank; use trainer=ddp with it."
        )
    if config.model.quantize and config.trainer.compile:
        raise ValueError(
            f"model.quantize={config.model.quantize} does not go with trainer.compile=true; leave one of them out."
        )
    if config.model.lora.export == "adapters":
        _check_peft_base(config.model.init_checkpoint)
    make = IdeficsModule if own is None or own.objective is None else own.objective
    return make(
        config.model,
        build_processor(config.data, config.model.init_checkpoint),
        list(config.data.sources),
        transform=DocumentsTransform(config.data),
        optim=config.optim,
        trainer_config=config.trainer,
        seed=config.seed,
        global_batch=config.data.batch_size,
        fingerprint=fingerprint,
    )


def _check_peft_base(source: str | None) -> None:
    """
    Raises:
        ValueError: Transformers cannot load what the adapters stand on.
    """
    if source is None:
        raise ValueError(
            "model.lora.export=adapters needs model.init_checkpoint: adapters alone are of no use beside weights that "
            "no checkpoint holds; set model.lora.export=merged."
        )
    found = locate(source)
    if isinstance(found, Path) and not (found / "config.json").exists():
        raise ValueError(
            f"model.lora.export=adapters needs a model.init_checkpoint that Transformers loads, and {source} is "
            "a run's checkpoint or a folder of adapters; convert it first (interloom convert), or set "
            "model.lora.export=merged."
        )


def build_samples(config: TrainConfig, run_dir: Path) -> SamplesCallback:
    """The callback that shows what the model writes.

    Raises:
        ValueError: there are no validation documents, or the weights lie in shards over ranks.
    """
    samples, data = config.callbacks.samples, config.data
    assert isinstance(data, DocumentsConfig)
    if not data.val:
        raise ValueError(
            "callbacks.samples continues documents of data.val, which is empty; name some, +data.val.NAME=[DIR], or "
            "set callbacks.samples.every_steps=0."
        )
    if config.trainer.strategy == "fsdp2":
        raise ValueError(
            "callbacks.samples cannot generate with trainer=fsdp2; set callbacks.samples.every_steps=0."
        )
    tokenizer = build_processor(data).tokenizer

    def load() -> list[Prompt]:
        rows = replace(data, eval_batch_size=4 * samples.documents, workers=0)
        batch = next(iter(documents_loader(rows, seed=config.seed, split="val")))
        return prompts(batch, DocumentsTransform(data)(batch), samples.documents, samples.max_new_tokens)

    return SamplesCallback(
        run_dir,
        load,
        tokenizer,
        [tokenizer.require("<image>"), tokenizer.require("<fake_token_around_image>")],
        every_steps=samples.every_steps,
        max_new_tokens=samples.max_new_tokens,
    )


def build_processor(data: DocumentsConfig, init_checkpoint: str | None = None) -> IdeficsProcessor:
    """The tokenizer the shards were made with, and the image settings of the data; the rest is the checkpoint's."""
    folder = Path(data.tokenizer)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.tokenizer={folder} does not exist; {how_to_make(folder) or 'give a folder with tokenizer.json'}."
        )

    def find(name: str) -> Path | None:
        return folder / name if (folder / name).exists() else None

    tokenizer = IdeficsTokenizer.from_files(find, str(folder))
    own = None if init_checkpoint is None else processor_of(init_checkpoint)
    images = replace(
        IdeficsImageProcessor() if own is None else own.image_processor,
        image_size=data.image_size,
        image_mean=list(data.mean),
        image_std=list(data.std),
        resample=data.resample,
        shortest_edge=None,  # the loader stretches pictures, and what is trained must be used alike
    )
    turns = None if own is None else own.add_end_of_utterance_token
    return IdeficsProcessor(images, tokenizer, add_end_of_utterance_token=turns)

"""What a run takes over from ``model.init_checkpoint``, or from its tokenizer, before anything is planned or built.

A checkpoint's own settings count: its ``config.json`` is the model that trains, its ``preprocessor_config.json`` rules
the pictures. What the command line says of the same things goes before it, with a message; what cannot be, because the
weights would not fit, is refused. ``config.yaml``, ``plan_only`` and the model all see the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ...models.configuration import ModelConfig

# What an experiment's file decides although the checkpoint says something: how to train, not what the model is.
_TRAINING = frozenset({"dropout", "attention_dropout", "drop_path_rate"})
_FREEZING = frozenset(
    {
        "freeze_text_layers",
        "freeze_text_module_exceptions",
        "freeze_vision_layers",
        "freeze_vision_module_exceptions",
        "freeze_lm_head",
    }
)
# How a run joins a language model and an image tower that it composes itself.
_JOINING = _FREEZING | {
    "alpha_initializer",
    "alpha_type",
    "alphas_initializer_range",
    "cross_layer_interval",
    "perceiver_config",
    "qk_layer_norms",
    "use_resampler",
}
_SHOWN = 8


def adopt(config: DictConfig, overrides: Iterable[str]) -> list[str]:
    """Fill ``config.model.config`` and the pictures' settings in ``config.data`` from ``model.init_checkpoint``.

    Args:
        config: the composed configuration of a run, changed in place.
        overrides: what the command line gave, as Hydra lists it.

    Returns:
        What the user is to be told, a line each.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, it is of another family, or an override asks for
            a model that its weights do not fit.
    """
    name = config.model.get("init_checkpoint")
    if config.model.get("init_text") is not None or config.model.get("init_vision") is not None:
        return adopt_sources(config, given_settings(overrides))
    if name is None:
        return adopt_vocabulary(config, given_settings(overrides))
    from ..checkpointing.load import family_of, own_images, saved_config

    values = saved_config(name)
    if family_of(values["model_type"]) != config.model.family:
        raise ValueError(
            f"model.init_checkpoint={name} holds a model of kind {values['model_type']}, but the run trains "
            f"model.family={config.model.family}; give another checkpoint or experiment."
        )
    given = given_settings(overrides)
    notes = adopt_model(config, values, given, str(name))
    images = own_images(name)
    if images is not None:  # weights without a processor leave the data's settings
        notes += adopt_pictures(config.data, images, given, str(name))
    return notes


def adopt_sources(config: DictConfig, given: Mapping[str, Any]) -> list[str]:
    """The same of ``model.init_text`` and ``model.init_vision``, from which the run composes its model.

    What joins the two (the gated blocks, the resampler, the freeze flags) is the run's own.

    Raises:
        ValueError: as the two sources, or an override asks for a model that their weights do not fit.
    """
    from ..objectives.idefics.composed import composition_of

    model: Any = OmegaConf.to_object(config.model)
    composed = composition_of(model, tokenizer=config.data.get("tokenizer"))
    source = f"{config.model.init_text} and {config.model.init_vision}"
    notes = adopt_model(config, composed.config.to_dict(), given, source, _JOINING)
    return notes + adopt_pictures(config.data, composed.processor.image_processor, given, source)


def adopt_vocabulary(config: DictConfig, given: Mapping[str, Any]) -> list[str]:
    """Make a GroupViT, whose weights are yet to be drawn, for the vocabulary of the tokenizer it trains with; say so.

    A model with more tokens than its tokenizer, and the same end token, is left as it is.
    """
    folder = config.model.get("tokenizer")
    if config.model.family != "groupvit" or not folder or not Path(folder).is_dir():
        return []  # what is not there is said where it is needed
    from ...models.groupvit import GroupViTTokenizer

    tokenizer, text = GroupViTTokenizer.from_pretrained(folder), config.model.config.text_config
    if tokenizer.vocab_size <= text.vocab_size and tokenizer.eos_token_id == text.eos_token_id:
        return []
    wanted = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id}
    if tokenizer.bos_token_id is not None:
        wanted["bos_token_id"] = tokenizer.bos_token_id
    if any(f"model.config.text_config.{name}" in given for name in wanted):
        return []
    for name, value in wanted.items():
        text[name] = value
    return [
        f"model.config.text_config has vocab_size={tokenizer.vocab_size} and eos_token_id={tokenizer.eos_token_id}, "
        f"those of the tokenizer {folder}."
    ]


def given_settings(overrides: Iterable[str]) -> dict[str, Any]:
    """Dotted names of what the command line sets, mappings taken apart, to their values."""
    found: dict[str, Any] = {}
    parser = OverridesParser.create()
    for text in overrides:
        override = parser.parse_override(text)
        if not override.is_delete():
            found |= _flat(override.value(), override.key_or_group)
    return found


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}").items()}


def adopt_model(
    config: DictConfig,
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    source: str,
    own_to_the_run: frozenset[str] = frozenset(),
) -> list[str]:
    """Make ``config.model.config`` the checkpoint's own, with what was given and what is about training; say so.

    Args:
        own_to_the_run: settings, by their first name, that the run's configuration decides.

    Raises:
        ValueError: what was given makes a model that the weights do not fit.
    """
    own = _model_of(config.model.family).config_class.from_dict(dict(values))
    keep_freezing = bool(config.model.get("reset_freezing", False))
    changed, overridden, notes = [], [], []
    target = config.model.config
    defaults = OmegaConf.structured(OmegaConf.get_type(target))
    for name, value in _leaves(own, target).items():
        path, leaf = f"model.config.{name}", name.rpartition(".")[2]
        if name.partition(".")[0] in own_to_the_run:
            continue
        before = _selected(target, name)
        told = before != _selected(defaults, name)  # by an experiment's file
        if path in given:
            if before != value:
                overridden.append(f"{path}={before!r} (the checkpoint has {value!r})")
        elif (leaf in _TRAINING and told) or (leaf in _FREEZING and keep_freezing):
            continue
        elif before != value:
            changed.append(f"{leaf}={value!r}")
            OmegaConf.update(target, name, value, merge=False, force_add=True)
    if overridden:
        check_fit(config, own, overridden, source)
        notes.append(f"warning: {'; '.join(overridden[:_SHOWN])}: trained as given on the command line.")
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        notes.append(f"model.config follows {source}: {', '.join(changed[:_SHOWN])}{more}.")
    return notes


def check_fit(config: DictConfig, own: Any, overridden: list[str], source: str) -> None:
    """
    Raises:
        ValueError: the weights of a model with configuration ``own`` do not fit the one that ``config`` describes.
    """
    family = config.model.family
    with torch.device("meta"):
        has = {name: value.shape for name, value in _model_of(family)(own).state_dict().items()}
        wanted = OmegaConf.to_object(config.model).model_config()  # type: ignore[union-attr]
        needs = {name: value.shape for name, value in _model_of(family)(wanted).state_dict().items()}
    odd = sorted(name for name in {*has, *needs} if has.get(name) != needs.get(name))
    if odd:
        raise ValueError(
            f"{'; '.join(overridden[:_SHOWN])}: the weights of {source} do not fit ({', '.join(odd[:3])}"
            f"{' …' if len(odd) > 3 else ''}); leave out what changes the model's shape."
        )


def adopt_pictures(data: DictConfig, images: Any, given: Mapping[str, Any], source: str) -> list[str]:
    """Make the size, the filter and the normalisation of the data the checkpoint's, unless given; say so."""
    changed, overridden, notes = [], [], []
    for name, value in (
        ("mean", [float(x) for x in images.image_mean]),
        ("std", [float(x) for x in images.image_std]),
        ("image_size", side_of(images)),
        ("resample", int(images.resample)),
        ("fit", "crop" if getattr(images, "do_center_crop", True) else "stretch"),
    ):
        if value is None or name not in data:
            continue
        before = data[name]
        before = OmegaConf.to_container(before) if OmegaConf.is_config(before) else before
        if before == value:
            continue
        if f"data.{name}" in given:
            overridden.append(f"data.{name}={before} (the checkpoint has {value})")
        else:
            changed.append(f"data.{name}={value}")
            data[name] = value
    if overridden:
        notes.append(f"warning: {'; '.join(overridden)}: trained as given on the command line.")
    if changed:
        notes.append(f"pictures follow preprocessor_config.json of {source}: {', '.join(changed)}.")
    return notes


def side_of(images: Any) -> int | None:
    """Side in pixels of the squares that an image processor makes; None where they are no squares."""
    if hasattr(images, "image_size"):
        return int(images.image_size)
    size = images.crop_size if images.do_center_crop else images.size
    sides = {size["height"], size["width"]} if "height" in size else {size.get("shortest_edge")}
    return sides.pop() if len(sides) == 1 else None


def _model_of(family: str) -> Any:
    from ..checkpointing.load import model_class

    return model_class(family)


def _leaves(settings: ModelConfig, target: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted names that ``target`` gives the fields of a configuration and of its parts, to plain values."""
    found: dict[str, Any] = {}
    aliases = {name: alias for alias, name in settings.aliases.items() if alias in target}
    for field in fields(settings):
        value = settings.stated(field.name)
        if isinstance(value, ModelConfig):
            if field.name in settings.choices:
                found[f"{prefix}{field.name}.model_type"] = value.model_type
            found |= _leaves(value, target[field.name], f"{prefix}{field.name}.")
        else:
            name = aliases.get(field.name, field.name)
            found[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def _selected(config: DictConfig, name: str) -> Any:
    value = OmegaConf.select(config, name)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

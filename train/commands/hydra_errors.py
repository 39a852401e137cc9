"""Hydra's and OmegaConf's errors as one sentence that names what the user may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from .hydra_hints import lightning_name, other_familys, path_for_group, wrong_form
from .own_experiments import is_global, missing_package_line, own_file_named, own_file_with

_COULD_NOT = re.compile(r"Could not (?:override|append to|delete from|append or override)[^']*'([^']+)'")
_COMPOSING = re.compile(
    r"In '(?P<name>[^']+)': \w+ raised while composing config:\n(?P<words>[^\n]*)(?:.*?full_key: (?P<key>\S+))?",
    re.S,
)
_MERGING = re.compile(r"Error merging override \+*([^=]+)=")
_NOT_IN = re.compile(r"Key '([^']+)' (?:is )?not in '")


def explain(error: Exception, arguments: list[str], config_name: str) -> str:
    """One sentence for the user: what was given, what is known, what to do."""
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        given = error.override.removeprefix("++")
        if given.startswith("data_path=") and config_name == "eval":
            given = given.replace("data_path=", "data=", 1)
        return f"{given!r} cannot be read as key=value; quote special characters as in key='\"a,b\"'."
    if isinstance(error, YAMLError):
        return _unreadable(error)
    if composing := _COMPOSING.match(str(error)):
        return _wrong_in_file(composing, arguments, config_name)
    text = _first_words(error)
    if "group override must be a string" in text:
        return "a group cannot be set to null; choose one of its names, for instance task=none."
    unknown = _COULD_NOT.search(str(error))
    if unknown:
        return _unknown(unknown[1].split("@")[0], config_name, arguments)
    cause = error.__cause__
    full_key = getattr(error, "full_key", None) or getattr(cause, "full_key", None)
    merging = _MERGING.search(str(error))
    words = f"{text} {_first_words(cause) if cause is not None else ''}"
    if form := wrong_form(str(full_key or (merging[1] if merging else "")), words, arguments):
        return form
    if cause is not None and type(cause).__name__ == "ValidationError":
        return f"{full_key}: {_first_words(cause)}." if full_key else f"{text}: {_first_words(cause)}."
    not_in = _NOT_IN.search(str(error)) or (_NOT_IN.search(str(cause)) if cause else None)
    if not_in and full_key:
        return _unknown(str(full_key), config_name, arguments)
    if full_key and str(full_key) not in text:
        return f"{full_key}: {text}."
    return f"{text}." if not text.endswith((".", "?")) else text


def _unreadable(error: YAMLError) -> str:
    """A file that is not YAML: where, and what the parser expected."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or _first_words(error)
    place = f"{mark.name}, line {mark.line + 1}" if mark is not None else "a configuration file"
    return f"{place} is not YAML ({problem}); mend the file."


def _wrong_in_file(composing: re.Match[str], arguments: list[str], config_name: str) -> str:
    """What Hydra found in one file of the configuration, in most cases one of the user's own."""
    name, words, key = composing["name"], composing["words"].rstrip("."), composing["key"]
    file = own_file_named(name, arguments)
    if file is not None and "/" in name and not is_global(file) and key == name.split("/")[0]:
        return missing_package_line(file)
    if key and _NOT_IN.search(words):
        return _unknown(key, config_name, arguments)
    where = f"{file or name}: " if not key else f"{key} in {file or name}: "
    return f"{where}{words}."


def unknown_setting(config: DictConfig, config_name: str, arguments: list[str]) -> str | None:
    """A sentence about the first setting that no schema knows, as ``+name=value`` can add, or None."""
    for key in _foreign(config):
        return _unknown(key, config_name, arguments)
    return None


def _unknown(key: str, config_name: str, arguments: list[str]) -> str:
    """A sentence about a name that no schema has: whose it is, where it stands, what may have been meant."""
    if known_elsewhere := lightning_name(key):
        return known_elsewhere
    known = known_keys(arguments, config_name, key)
    if other := other_familys(key, known):
        return other
    near = nearest(key, known)
    hint = f"did you mean {' or '.join(near)}?" if near else "`--cfg job` lists the settings."
    file = own_file_with(key, arguments)
    if file is None:
        return f"{key!r} is not a setting of {config_name}; {hint}"
    if not is_global(file):
        return missing_package_line(file)
    return f"{key!r} in {file} is not a setting of {config_name}; {hint}"


def _foreign(config: DictConfig, prefix: str = "") -> Iterator[str]:
    schema = OmegaConf.get_type(config)
    known = {item.name for item in fields(schema)} if is_dataclass(schema) else None
    for key in config:
        if known is not None and key not in known:
            yield f"{prefix}{key}"
        elif not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            yield from _foreign(config[key], f"{prefix}{key}.")


def _unknown_choice(error: MissingConfigException) -> str:
    """``experiment=groupvit_dmo``: the group has no such file."""
    missing = str(error.missing_cfg_file or "")
    group, _, name = missing.rpartition("/")
    options = [str(option) for option in error.options or ()]
    options = [option for option in options if not option.endswith("_schema")]
    if not group:
        return f"the configuration {missing!r} does not exist."
    if path := path_for_group(group, name):
        return path
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(options) or 'none'}."
    return f"{group}={name} is not known; {hint}"


def nearest(key: str, known: Iterable[str]) -> list[str]:
    """Up to three known dotted names that look like ``key``, or whose last part does."""
    names = sorted(set(known))
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.75)
    if near:
        return near
    last = key.rpartition(".")[2]
    ends = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in names}, n=3, cutoff=0.75)
    return sorted(
        (name for name in names if name.rpartition(".")[2] in ends), key=lambda n: -_likeness(key, n)
    )[:3]


def _likeness(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def known_keys(arguments: list[str], config_name: str, without: str) -> list[str]:
    """The dotted names of the configuration that the other arguments compose, and its groups."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    overrides = [
        argument
        for argument in arguments
        if "=" in argument and not argument.startswith("-") and without not in argument.partition("=")[0]
    ]
    GlobalHydra.instance().clear()
    for attempt in (overrides, [o for o in overrides if o.startswith("experiment=")], []):
        try:
            with initialize_config_module("interloom.conf", version_base="1.3"):
                config = compose(config_name, overrides=[o for o in attempt if "," not in o])
        except Exception:  # another argument is wrong as well: its error comes when this one is mended
            continue
        return ["experiment", "debug", *_dotted(OmegaConf.to_container(config, resolve=False))]
    return []


def _dotted(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _dotted(value, f"{prefix}{key}.")


def _first_words(error: BaseException) -> str:
    """The first line of an error without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__

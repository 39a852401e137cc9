"""``from_pretrained`` and ``save_pretrained`` for any model with a `ModelConfig`."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .archives import check_layers
from .checkpoint import CheckpointFolder, HubOptions, Reader, load_into, save_folder
from .configuration import ModelConfig
from .received import blaming
from .trainable import TrainableModel, check_attention

# Options that change nothing here: weights are always streamed, and code in a checkpoint is never run.
_WITHOUT_EFFECT = frozenset(
    {
        "force_download", "low_cpu_mem_usage", "offload_buffers", "offload_folder", "proxies", "resume_download",
        "trust_remote_code", "use_auth_token", "use_safetensors", "weights_only", "_fast_init", "key_mapping",
    }
)  # fmt: skip
_REFUSED = {
    "quantization_config": "weights are not quantised here; use dtype='bfloat16', or quantise with torchao",
    "load_in_8bit": "weights are not quantised here; use dtype='bfloat16', or quantise with torchao",
    "load_in_4bit": "weights are not quantised here; use dtype='bfloat16', or quantise with torchao",
    "from_tf": "the kind of a weights file is seen from its name; leave it out",
    "from_flax": "Flax weights are not read; convert them to safetensors",
    "gguf_file": "GGUF files are not read; give a folder with safetensors",
    "max_memory": "a model is not split over devices; give one device, or shard in training",
    "tp_plan": "a model is not split over devices; give one device, or shard in training",
    "variant": "files of a variant are not looked for; give the revision that holds it",
}


class PretrainedModel(TrainableModel):
    """Base of the public models.

    Subclasses set ``config_class`` and override the hooks `read_config`, `rename`, `optional` and
    ``weight_readers`` where their files differ from their modules.
    """

    config_class: ClassVar[type[ModelConfig]]
    weight_readers: ClassVar[Mapping[str, Reader]] = {}

    config: Any

    def __init__(self, config: Any):
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"{type(self).__name__} was given a {type(config).__name__}; "
                f"expected a {self.config_class.__name__}."
            )
        self.config = config

    @classmethod
    def read_config(cls, path: Path) -> Any:
        """Configuration for this class from a ``config.json``."""
        return cls.config_class.from_json_file(path)

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Name in a file to name in the module; None for weights that are known and not needed here."""
        return name

    @classmethod
    def optional(cls, name: str) -> bool:
        """Whether files may lack this weight."""
        return name.endswith("num_batches_tracked")

    def read_beside(self, folder: CheckpointFolder) -> None:
        """Take what a checkpoint holds of this model beside weights and ``config.json``."""

    def write_beside(self, folder: Path) -> None:
        """Write the same."""

    def as_transformers(self, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The configuration and the weights with which Transformers computes what this model does.

        Raises:
            ValueError: Transformers has no such model (what of it is named).
        """
        return self.config, state

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: Any = None,
        state_dict: Mapping[str, Tensor] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        attn_implementation: str | None = None,
        **options: Any,
    ) -> Any:
        """Load a folder in the format of Transformers, or a hub id, in evaluation mode.

        Weights are read one at a time onto the device in ``dtype``; the model is never in memory twice.

        Args:
            path: a folder with ``config.json`` and weights (sharded or not), or ``owner/name`` on the hub; None where
                ``config`` and ``state_dict`` say all. ``pretrained_model_name_or_path`` is its other name.
            config: use this instead of the checkpoint's ``config.json``; a folder or hub id that has one serves.
            dtype: floating-point type of the weights (``"bfloat16"`` works too); None or ``"auto"`` keeps
                the file's. ``torch_dtype`` is its older name.
            device: where the weights go. ``device_map`` says the same: a device, ``{"": device}``, or ``"auto"``
                for the accelerator if there is one.
            state_dict: weights to take instead of the files'.
            ignore_mismatched_sizes: leave weights of another shape as a new model draws them.
            output_loading_info: return a tuple of the model and a dictionary of ``missing_keys``,
                ``unexpected_keys`` and ``mismatched_keys``. Who asks for it sees to what is missing: such weights
                are those of a new model, and no error.
            attn_implementation: ``"sdpa"`` and ``"eager"`` are accepted: results are the same.
            options: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and ``subfolder`` for
                ``huggingface_hub``; any other is a setting that replaces the configuration's.

        Raises:
            ValueError: there is no such checkpoint, it is of another model, it is damaged, weights are
                unknown, missing or misshapen (listed), or an option is not known.
        """
        path = options.pop("pretrained_model_name_or_path", path)
        where = place(device, device_map)
        check_attention(attn_implementation)
        for name, reason in _REFUSED.items():
            if options.pop(name, None):
                raise ValueError(f"from_pretrained was given {name}: {reason}.")
        hub_names = {f.name for f in fields(HubOptions)}
        hub = HubOptions(**{name: value for name, value in options.items() if name in hub_names})
        changes = {k: v for k, v in options.items() if k not in hub_names | _WITHOUT_EFFECT}
        if path is None and (config is None or state_dict is None):
            raise ValueError(
                "from_pretrained was given no path; give a folder, or both config and state_dict."
            )
        folder = None if path is None else CheckpointFolder(path, hub)
        if config is None:
            assert folder is not None
            config = cls.read_config(folder.require("config.json"))
        elif isinstance(config, str | os.PathLike):
            config = cls.config_class.from_pretrained(config)
        config = _changed(cls, config, changes)
        source = "state_dict" if folder is None else folder.name
        files = []
        if state_dict is None:
            assert folder is not None
            files = folder.weight_files(cls.weight_readers)
            check_layers(config, sum(file.stat().st_size for file, _ in files), source)
        memory = torch.device("cpu" if ignore_mismatched_sizes else "meta")
        with memory, blaming(f"config.json of {source}"):
            model = cls(config)
        of_base = False

        def rename(name: str) -> str | None:
            nonlocal of_base
            target = cls.rename(name)
            of_base = of_base or (target is not None and target == f"{cls.base_model_prefix}.{name}")
            return target

        def redraw(missing: list[str]) -> Mapping[str, Tensor] | None:
            headless = of_base and not any(n.startswith(f"{cls.base_model_prefix}.") for n in missing)
            if headless:
                warnings.warn(
                    f"{source} holds the model without its head: {', '.join(missing)} are newly drawn, and need "
                    "training.",
                    stacklevel=4,
                )
            return cls(config).state_dict() if headless or output_loading_info else None

        info = load_into(
            model,
            iter(state_dict.items())
            if state_dict is not None
            else (item for file, reader in files for item in reader(file)),
            source=source,
            rename=rename,
            optional=cls.optional,
            dtype=_dtype(dtype if dtype is not None else torch_dtype),
            device=where,
            keep_misshapen=ignore_mismatched_sizes,
            keep_unknown=output_loading_info,
            redraw=redraw,
        )
        if folder is not None:
            model.read_beside(folder)
            model.__dict__["name_or_path"] = folder.name
        model.eval()
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        for_transformers: bool = False,
        **hub: Any,
    ) -> None:
        """Write ``config.json`` and safetensors that Transformers loads too, where it has such a model.

        Args:
            folder: made if missing; a checkpoint already there is replaced.
            is_main_process: false on all ranks but one, which then write nothing.
            state_dict: weights to write instead of this module's (gathered from shards, say).
            max_shard_size: above this the weights are split into several files with an index.
            safe_serialization: false writes ``pytorch_model.bin``, which old programs read.
            push_to_hub: send the folder to ``repo_id`` (its name by default) as well; ``hub`` are the options of
                `push_to_hub`.
            for_transformers: write what Transformers reads or nothing: what it can only say otherwise (grouped heads of
                an IDEFICS) is written so.

        Raises:
            ValueError: an option is not known, the folder is a file, or Transformers has no such model.
        """
        unknown = sorted(
            hub.keys() - _PUSH - {"save_peft_format", "variant", "save_function", "save_original_format"}
        )
        if unknown:
            raise ValueError(f"save_pretrained was given {', '.join(unknown)}, which it does not know.")
        if not is_main_process:
            return
        state, config = self.state_dict() if state_dict is None else state_dict, self.config
        if for_transformers:
            config, state = self.as_transformers(state)
        dtype = str(next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32))
        save_folder(
            folder,
            state,
            config.to_json(architectures=[type(self).__name__], dtype=dtype.removeprefix("torch.")),
            max_shard_size=max_shard_size,
            safe=safe_serialization,
        )
        self.write_beside(Path(folder))
        if push_to_hub:
            send(folder, repo_id or Path(folder).name, **{k: v for k, v in hub.items() if k in _PUSH})

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str = "5GB", safe_serialization: bool = True, **hub: Any
    ) -> Any:
        """Save the model and send its files to ``repo_id`` on the hub, which is made if missing.

        Args:
            hub: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``; ``dry_run=True`` sends
                nothing.

        Returns:
            What ``huggingface_hub`` says of the commit; or, of a dry run, names to sizes in bytes.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, safe_serialization=safe_serialization)
            return send(folder, repo_id, **hub)


_PUSH = frozenset(
    {"private", "token", "revision", "commit_message", "commit_description", "create_pr", "dry_run"}
)


def send(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
    commit_message: str = "Upload model",
    **commit: Any,
) -> Any:
    """Send the files of a folder to a repository of the hub (`PretrainedModel.push_to_hub`)."""
    sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()}
    if dry_run:
        return sizes
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(  # pyright: ignore[reportCallIssue]
        repo_id=repo_id,
        folder_path=Path(folder),
        commit_message=commit_message,
        allow_patterns=list(sizes),
        **{name: value for name, value in commit.items() if value is not None},
    )


def place(device: torch.device | str | None, device_map: Any) -> torch.device | str:
    """The one device that ``device`` or ``device_map`` means; the CPU by default.

    Raises:
        ValueError: both are given, or a map over several devices.
    """
    if device_map is None:
        return "cpu" if device is None else device
    if device is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r} say the same; give one of them.")
    if isinstance(device_map, Mapping):
        if len(set(map(str, device_map.values()))) != 1:
            raise ValueError(
                f"device_map spreads the model over {len(device_map)} places; a model loads onto one device: give "
                "it, or shard in training (trainer strategies)."
            )
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if accelerator is None else accelerator
    if isinstance(device_map, int):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cuda" if accelerator is None else accelerator.type, device_map)
    return device_map


def _changed(cls: type[PretrainedModel], config: Any, changes: dict[str, Any]) -> Any:
    """The configuration with what ``from_pretrained`` was told to change in it."""
    known = {f.name for f in fields(config)} | set(config.aliases)
    unknown = sorted(name for name in changes if name not in known and name not in config.kept())
    if unknown:
        raise ValueError(
            f"{cls.__name__}.from_pretrained was given {', '.join(unknown)}, which is neither an option nor a "
            f"setting of {type(config).__name__}; check the name."
        )
    return config.with_overrides(changes)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is not a floating-point type of torch; use 'float32' or 'bfloat16'."
        )
    return found

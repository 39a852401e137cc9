"""Checkpoint folders on disk or on the hub: find them, stream their tensors, fill a model, write them.

Formats: ``model.safetensors``, sharded safetensors, ``pytorch_model.bin`` (sharded or not; read with
``weights_only``, so no code in a file is ever run), and whatever further readers a model brings.
"""

from __future__ import annotations

import os
import re
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from .archives import check_archive, check_tensor
from .files import check_room, discard, file_mode, make_staging, sync_path, writing
from .inside import inside
from .lazy import explained
from .received import read_settings

Reader = Callable[[Path], Iterator[tuple[str, Tensor]]]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_LISTED = 20
_ALIGNMENT = 64  # bytes, as PyTorch allocates on the CPU


@dataclass(frozen=True)
class HubOptions:
    """Where and how to fetch what is not a local folder; the names are those of ``huggingface_hub``."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    subfolder: str | None = None


class CheckpointNotFoundError(ValueError, OSError):
    """There is no such checkpoint, or it lacks a file; also an `OSError`, which is what Transformers raises."""


class CheckpointFolder:
    """A checkpoint as a folder of files, local or on the hub (files are fetched as they are asked for).

    Args:
        path: a folder, or a hub id such as ``nvidia/groupvit-gcc-yfcc``.
        hub: options for hub ids.

    Raises:
        CheckpointNotFoundError: ``path`` is neither an existing folder nor shaped like a hub id.
    """

    def __init__(self, path: str | os.PathLike[str], hub: HubOptions | None = None):
        self.name = os.fspath(path)
        self.hub = hub or HubOptions()
        local = Path(path).expanduser()
        self.local = local if local.is_dir() else None
        if self.local is not None:
            self.local = self.local / (self.hub.subfolder or "")
            if not self.local.is_dir():
                raise CheckpointNotFoundError(
                    f"{self.name} has no folder {self.hub.subfolder}; check subfolder."
                )
            return
        if local.exists():
            raise ValueError(f"{self.name} is a file; give the checkpoint folder that holds config.json.")
        if not _HUB_ID.match(self.name):
            raise CheckpointNotFoundError(
                f"{self.name} does not exist; give a checkpoint folder or a hub id (owner/name)."
            )

    def find(self, name: str) -> Path | None:
        """Local path of a file of the checkpoint, or None if the checkpoint has no such file.

        Raises:
            ValueError: the name, which may come from the checkpoint itself, leads out of it.
        """
        if self.local is not None:
            path = inside(self.local, name)
            return path if path.is_file() else None
        inside(os.curdir, name, follow_links=True)  # as written: it becomes part of an address and of a path
        with explained("fetching from the hub"):
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import (
                EntryNotFoundError,
                GatedRepoError,
                HfHubHTTPError,
                LocalEntryNotFoundError,
                RepositoryNotFoundError,
            )

        try:
            return Path(
                hf_hub_download(
                    self.name,
                    name,
                    subfolder=self.hub.subfolder,
                    revision=self.hub.revision,
                    cache_dir=self.hub.cache_dir,
                    token=self.hub.token,
                    local_files_only=self.hub.local_files_only or not self._reachable,
                )
            )
        except LocalEntryNotFoundError as error:
            # Offline, a file the repository lacks and one that was never fetched look the same.
            if self._cached("config.json"):
                return None
            raise CheckpointNotFoundError(
                f"{self.name} is not a local folder, and the hub cannot be reached or has not been asked "
                "for it before; check the path or the connection."
            ) from error
        except EntryNotFoundError:
            return None
        except GatedRepoError as error:
            raise ValueError(
                f"{self.name} is gated: its owners let those in who accept their terms on its page of the hub; do so, "
                "log in (hf auth login, or HF_TOKEN), and try again."
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointNotFoundError(
                f"{self.name} is not a local folder, and could not be fetched from the hub: there is no such "
                "repository, or it is private; check the name, or log in (hf auth login, or HF_TOKEN)."
            ) from error
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointNotFoundError(
                f"{self.name} is not a local folder and could not be fetched from the hub: {reason}"
            ) from error

    @cached_property
    def _reachable(self) -> bool:
        """Whether the hub's name resolves: without a network the client would try for a minute."""
        from huggingface_hub import constants

        if getproxies():
            return True
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            return False
        return True

    def require(self, name: str) -> Path:
        path = self.find(name)
        if path is None:
            raise CheckpointNotFoundError(
                f"{self.name} has no {name}; give the folder of a complete checkpoint."
            )
        return path

    def tensors(self, readers: Mapping[str, Reader] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Stream (name, tensor) from the first kind of weights file there is.

        Args:
            readers: file name to reader, for formats beyond safetensors and ``pytorch_model.bin``.

        Raises:
            ValueError: no weights, a shard is missing, or a file is damaged or holds more than tensors.
        """
        return (item for path, reader in self.weight_files(readers) for item in reader(path))

    def weight_files(self, readers: Mapping[str, Reader] | None = None) -> list[tuple[Path, Reader]]:
        """The files that :meth:`tensors` streams, with what reads each.

        Raises:
            ValueError: there are none, or one of several is missing.
        """
        for name, reader in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
            if path := self.find(name):
                return [(path, reader)]
            if path := self.find(f"{name}.index.json"):
                return [(shard, reader) for shard in self._shards(path)]
        for name, reader in (readers or {}).items():
            if path := self.find(name):
                return [(path, reader)]
        known = ["model.safetensors", "pytorch_model.bin", *(readers or {})]
        raise ValueError(f"{self.name} has no weights; expected one of {', '.join(known)} (or their shards).")

    def _shards(self, index: Path) -> list[Path]:
        shards = read_settings(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{index} is not an index of shards (no weight_map); restore it.")
        names = sorted(set(shards.values()))
        missing = [name for name in names if self.find(name) is None]
        if missing:
            raise ValueError(f"{self.name} lacks shards named in {index.name}: {_list(missing)}.")
        return [self.require(name) for name in names]

    def _cached(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(
            self.name,
            f"{self.hub.subfolder}/{name}" if self.hub.subfolder else name,
            cache_dir=self.hub.cache_dir,
            revision=self.hub.revision,
        )
        return isinstance(cached, str)


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one safetensors file, one at a time."""
    with explained("reading a checkpoint"):
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the handle itself does not iterate)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); fetch it again.") from error


def read_bin(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one ``torch.save`` file, read with ``weights_only``."""
    mapped = zipfile.is_zipfile(path)
    if mapped:
        check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises a dozen kinds for files that are no checkpoints
        raise ValueError(
            f"{path} is damaged or holds Python objects beside tensors, which are never loaded; convert "
            "it to safetensors where you trust it."
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ValueError(f"{path} is not a state dictionary (names to tensors); save model.state_dict().")
    for name, tensor in state.items():
        check_tensor(path, name, tensor)
        yield name, tensor


def load_into(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str,
    rename: Callable[[str], str | None] | None = None,
    optional: Callable[[str], bool] = lambda name: False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_misshapen: bool = False,
    keep_unknown: bool = False,
    redraw: Callable[[list[str]], Mapping[str, Tensor] | None] = lambda names: None,
) -> dict[str, set[Any]]:
    """Put streamed tensors into ``model``, which may live on the meta device; each is freed before the next.

    Parameters that share their weights (tied embeddings) still do afterwards, and one of their names is
    enough.

    Args:
        model: parameters and persistent buffers are replaced, so no copy is kept of meta ones.
        tensors: (name, tensor) pairs; `CheckpointFolder.tensors` makes them.
        source: name of the checkpoint for messages.
        rename: name in the file to name in the model; None drops a weight that is known and not needed.
        optional: names of the model that a file may lack; they keep their value (zeros, if on meta).
        dtype: type for floating-point tensors; None keeps the file's.
        device: where the tensors go.
        keep_misshapen: leave weights of another shape as ``model`` has them.
        keep_unknown: leave weights that the model has not aside.
        redraw: gives what a new model has of the weights that the files lack; None where that is an error.

    Returns:
        ``missing_keys``, ``unexpected_keys`` (with those that ``rename`` drops) and ``mismatched_keys``, (name, shape
        in the file, shape in the model).

    Raises:
        ValueError: weights are unknown, missing or of the wrong shape; the message lists them.
    """
    expected = model.state_dict(keep_vars=True)
    unknown: list[str] = []
    misshapen: list[tuple[str, list[int], list[int]]] = []
    dropped: list[str] = []
    loaded: set[str] = set()
    shared: dict[int, list[str]] = {}
    for name, value in expected.items():
        shared.setdefault(id(value), []).append(name)
    names_of = {name: names for names in shared.values() for name in names}
    for name, tensor in tensors:
        target = rename(name) if rename else name
        if target is None:
            dropped.append(name)
            continue
        if target not in expected:
            unknown.append(name)
            continue
        if tensor.shape != expected[target].shape:
            misshapen.append((target, list(tensor.shape), list(expected[target].shape)))
            continue
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        _assign(model, names_of[target], _own(tensor.to(device=device, dtype=kind)))
        loaded.update(names_of[target])
    wrong = {name for name, _, _ in misshapen}
    differ = [f"{name} is {found}, expected {wanted}" for name, found, wanted in misshapen]
    missing = [n for n in expected if n not in loaded and n not in wrong and not optional(n)]
    absent = {name for name in expected if name not in loaded and name not in wrong}
    if keep_unknown:
        dropped, unknown = dropped + unknown, []
    if missing and (drawn := redraw(missing)) is not None:
        for name in missing:
            kind = dtype if dtype is not None and drawn[name].is_floating_point() else drawn[name].dtype
            _assign(model, names_of[name], drawn[name].detach().to(device=device, dtype=kind))
            loaded.update(names_of[name])
        missing = []
    problems = [
        f"{kind} weights ({len(names)}): {_list(names)}"
        for kind, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("misshapen", [] if keep_misshapen else differ),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Give a checkpoint of the same model and configuration."
        )
    for name, value in expected.items():
        if name not in loaded and value.device.type == "meta":
            _assign(model, [name], torch.zeros(value.shape, dtype=value.dtype, device=device))
        elif name in wrong:
            kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
            _assign(model, names_of[name], value.detach().to(device=device, dtype=kind))
    return {
        "missing_keys": absent,
        "unexpected_keys": set(dropped),
        "mismatched_keys": {(name, tuple(found), tuple(wanted)) for name, found, wanted in misshapen},
    }


def save_folder(
    folder: str | os.PathLike[str],
    state: dict[str, Tensor],
    config_json: str,
    *,
    max_shard_size: int | str = "5GB",
    safe: bool = True,
) -> Path:
    """Write ``config.json`` and safetensors (sharded above ``max_shard_size``) as Transformers lays them out.

    ``safe=False`` writes ``pytorch_model.bin`` instead, which ``torch.load`` reads.

    Files are written beside the folder's and moved in at the end, ``config.json`` last, so an interrupted save leaves
    what was there, and a new folder is no checkpoint before it is one.

    Raises:
        NotWrittenError: no room or no right; nothing has changed then.
    """
    with explained("writing a checkpoint"):
        from huggingface_hub import save_torch_state_dict

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save the checkpoint in.")
    new = not folder.exists()
    scratch = make_staging(folder / "model")
    needed = sum(tensor.nbytes for tensor in state.values())
    try:
        check_room(folder / "model.safetensors", needed)
        with writing(folder / "model.safetensors", needed):
            save_torch_state_dict(
                {name: tensor.detach().contiguous() for name, tensor in state.items()},
                scratch,
                max_shard_size=max_shard_size,
                metadata={"format": "pt"},
                safe_serialization=safe,
            )
            (scratch / "config.json").write_text(config_json, encoding="utf-8")
            mode = file_mode()
            for path in scratch.iterdir():
                path.chmod(mode)  # the library may have made it private
                sync_path(path)
        written = {path.name for path in scratch.iterdir()}
        for name in sorted(written, key=lambda name: (name == "config.json", name)):
            os.replace(scratch / name, folder / name)
        for stale in (*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")):
            if stale.name not in written:
                stale.unlink()
    finally:
        discard(scratch)
        if new:
            with suppress(OSError):  # a folder in which nothing came to be
                folder.rmdir()
    return folder


def _own(tensor: Tensor) -> Tensor:
    """``tensor`` at an address such as PyTorch's allocator gives.

    A file mapped into memory puts tensors at any address, and matrix products then add in another order: the same
    weights would give results that differ in the last bit with the container they were read from.
    """
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _assign(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Replace one parameter or buffer under all the names that share it."""
    new: Tensor | None = None
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._parameters:
            old = owner._parameters[leaf]
            if new is None:
                new = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
            owner._parameters[leaf] = new  # pyright: ignore[reportArgumentType]
        else:
            owner._buffers[leaf] = tensor


def _list(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")

"""The tokenizer of a language model, and room in it for the tokens that pictures need.

IDEFICS keeps the base model's tokens (ids below ``vocab_size``) and added ones (from there on) in tables of their own.
So the added tokens' ids must begin where the base model's table ends, which may be later than its tokenizer does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...received import read_settings
from ...received_tokenizer import read_tokenizer
from ...tokenizer import chat_template, content_of
from ..tokenizer import IdeficsTokenizer

_UNUSED = "<|interloom_unused_{}|>"


def source_tokenizer(
    find: Callable[[str], Path | None], source: str, settings: Mapping[str, Any]
) -> IdeficsTokenizer:
    """The tokenizer of a language model's folder; roles that it leaves open are filled.

    A text begins with a token only where the tokenizer puts one there itself. Without a padding token the unknown one
    pads, and without that the end token.

    Raises:
        ValueError: there is no ``tokenizer.json``, it is damaged, or there is no end token.
    """
    path = find("tokenizer.json")
    if path is None:
        # It says what to do about a tokenizer.model alone.
        return IdeficsTokenizer.from_files(find, source)
    backend = read_tokenizer(path)
    files: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if file := find(name):
            files.update(read_settings(file))
    files |= chat_template(find)
    names = {
        role: content_of(files.get(role)) for role in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    return tokenizer_of(backend, source, settings, names, files)


def tokenizer_of(
    backend: Tokenizer,
    source: str,
    settings: Mapping[str, Any],
    names: Mapping[str, str | None],
    files: Mapping[str, Any],
) -> IdeficsTokenizer:
    """``backend`` with the roles that ``names`` give its tokens, or that the model's ``settings`` give their ids.

    Raises:
        ValueError: there is no end token.
    """
    ends = settings.get("eos_token_id")
    first = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
    end = names.get("eos_token") or (backend.id_to_token(first) if isinstance(first, int) else None)
    if end is None:
        raise ValueError(
            f"{source} has no end token: neither tokenizer_config.json names an eos_token nor config.json an "
            "eos_token_id that the tokenizer knows."
        )
    unknown = names.get("unk_token")
    if unknown is None or backend.token_to_id(unknown) is None:
        unknown = "<unk>" if backend.token_to_id("<unk>") is not None else None
    tokens: dict[str, str | None] = {
        "eos_token": end,
        "unk_token": unknown or end,
        "pad_token": names.get("pad_token") or unknown or end,
        "bos_token": _begin(backend, names.get("bos_token"), end, files) or "",
    }
    length = files.get("model_max_length")
    extra = files.get("additional_special_tokens") or files.get("extra_special_tokens") or []
    kept = {
        k: v for k, v in files.items() if k not in ("added_tokens_decoder", "auto_map", "tokenizer_class")
    }
    return IdeficsTokenizer(
        backend,
        tokens,
        model_max_length=int(length) if isinstance(length, (int, float)) and length < 1_000_000 else None,
        additional_special_tokens=[content_of(t) or "" for t in extra] if isinstance(extra, list) else [],
        settings=kept,
    )


def _begin(backend: Tokenizer, named: str | None, end: str, files: Mapping[str, Any]) -> str | None:
    """The token that the tokenizer puts before a text, if it does."""
    if files.get("add_bos_token") is not None:
        return named if files["add_bos_token"] else None
    put = backend.encode("", add_special_tokens=True).tokens
    if put and put[0] != end:
        return put[0]
    # The first LLaMAs' files leave it to the program that reads them.
    return named if named == "<s>" else None


def make_room(
    tokenizer: IdeficsTokenizer, rows: int, tokens: Sequence[str], source: str
) -> tuple[IdeficsTokenizer, int]:
    """Add ``tokens`` behind the ``rows`` tokens of the base model's table.

    Where the table is wider than the vocabulary the ids between them get names that no text holds.

    Returns:
        The tokenizer, and how many tokens it has from ``rows`` on: ``additional_vocab_size``.

    Raises:
        ValueError: the tokenizer knows tokens that the model has no row for, or its kind of vocabulary takes no more.
    """
    backend = tokenizer.backend
    plain = backend.get_vocab(with_added_tokens=False)
    if (highest := max(plain.values(), default=-1)) >= rows:
        raise ValueError(
            f"the tokenizer of {source} has {highest + 1} tokens but its model only {rows} rows of embeddings, so "
            "there is no room for the tokens of pictures behind them; give the tokenizer that belongs to the weights."
        )
    known = backend.get_vocab(with_added_tokens=True)
    beyond = sorted(number for number in known.values() if number >= rows)
    if beyond and beyond != list(range(rows, rows + len(beyond))):
        raise ValueError(
            f"the tokenizer of {source} has added tokens up to id {beyond[-1]} with gaps from {rows} on, where its "
            "model's embeddings end; give the tokenizer that belongs to the weights."
        )
    if len(known) - len(beyond) < rows:
        backend = _filled(backend, known, rows, source)
    made = IdeficsTokenizer(
        backend,
        {**tokenizer.special_tokens_map, "bos_token": tokenizer.bos_token or ""},
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_max_length=tokenizer.model_max_length,
        additional_special_tokens=tokenizer.additional_special_tokens,
        settings=tokenizer.settings,
    )
    made.add_tokens(list(tokens), special_tokens=True)
    return made, max(made.get_vocab().values()) + 1 - rows


def _filled(backend: Tokenizer, known: Mapping[str, int], rows: int, source: str) -> Tokenizer:
    """The same tokenizer whose vocabulary has a token for every id below ``rows``.

    Raises:
        ValueError: the vocabulary is no dictionary or list.
    """
    described = json.loads(backend.to_str())
    below = {number: token for token, number in known.items() if number < rows}
    names = [below.get(number) or _UNUSED.format(number) for number in range(rows)]
    model = described["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {name: number for number, name in enumerate(names)}
    elif isinstance(model.get("vocab"), list):
        scores = dict(model["vocab"])
        lowest = min(scores.values(), default=0.0)
        model["vocab"] = [[name, scores.get(name, lowest - 1e4)] for name in names]
    else:
        raise ValueError(
            f"the tokenizer of {source} is a {model.get('type')}, which takes no further tokens; give a BPE or Unigram "
            "tokenizer."
        )
    return Tokenizer.from_str(json.dumps(described))

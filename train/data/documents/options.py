"""What a conversion of documents depends on, besides its source."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..download import FetchPolicy
from .records import Filters


@dataclass(frozen=True)
class ConvertOptions:
    """What a shard's content depends on, besides the source.

    Attributes:
        tokenizer: folder with ``tokenizer.json``.
        filters: which images and documents stay; None takes the published ones for web pages and else none.
        records_per_shard: records of the source that become one shard.
        image_root: folder that relative image paths start from; None refuses paths.
        max_side: longer sides are scaled down to this many pixels; None keeps the bytes.
        fetch: ask the web for images that are only addresses.
        fetch_policy: limits of that.
        fetch_cache: folder of the content-addressed cache; None keeps nothing.
    """

    tokenizer: str
    filters: Filters | None = field(default_factory=Filters)
    records_per_shard: int = 4096
    image_root: str | None = None
    max_side: int | None = None
    fetch: bool = False
    fetch_policy: FetchPolicy = field(default_factory=FetchPolicy)
    fetch_cache: str | None = None

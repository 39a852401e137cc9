"""What the tests of other people's documents share."""

import json

import pyarrow as pa
from interloom.train.data.documents.options import ConvertOptions
from interloom.train.data.documents.records import Filters
from interloom.train.data.shards.reader import ShardReader, ShardSet

WORDS = "the number of objects is one . the red one is a mushroom ."


def stored(folder):
    shards = ShardSet.open([str(folder)], kind="documents")
    reader = ShardReader(shards)
    return [reader.read(sample) for sample in range(len(shards))]


def options(tokenizer_folder, root=None, **more):
    return ConvertOptions(
        str(tokenizer_folder), filters=Filters.none(), image_root=root and str(root), **more
    )


def lines(records) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def compressed(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)

"""What the tests of other tools' tars and folders share."""

import io
import tarfile

from interloom.train.cli import main
from interloom.train.data.pairs.captions import read_captions
from interloom.train.data.shards.reader import ShardReader, ShardSet
from PIL import Image


def picture(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24 + i, 20), (9 * i % 256, 100, 50)).save(out, "JPEG")
    return out.getvalue()


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            data = data if isinstance(data, bytes) else data.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pairs_of(folder) -> list[tuple[bytes, list[str]]]:
    reader = ShardReader(ShardSet.open(folder))
    records = [reader.read(i) for i in range(len(reader.shards))]
    return [(next(bytes(d) for e, d in r.members.items() if e == "jpg"), read_captions(r)) for r in records]


def index(folder, *more) -> int:
    return main(["data", "pairs", str(folder), "--index-only", "--workers", "1", *more])


def make(source, out, *more) -> int:
    return main(["data", "pairs", str(source), str(out), "--workers", "1", *more])

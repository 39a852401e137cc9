"""Compare the files of a wheel with those of the tree: a subpackage missing from pyproject.toml imports in an
editable install and is absent from the wheel."""

import subprocess
import sys
import zipfile
from pathlib import PurePosixPath

ROOMS = ("kernels", "models", "train", "conf")
SHIPPED = {".py", ".yaml", ".txt", ".csv", ".json"}

tracked = subprocess.run(
    ["git", "ls-files", *ROOMS], check=True, capture_output=True, text=True
).stdout.split("\n")
expected = {f"interloom/{path}" for path in tracked if PurePosixPath(path).suffix in SHIPPED}
found = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if name.startswith("interloom/")}
for title, paths in (
    ("in the tree, not in the wheel", expected - found),
    ("in the wheel only", found - expected),
):
    for path in sorted(paths):
        print(f"{title}: {path}")
print(f"{len(found)} files in the wheel, {len(expected)} in the tree")
sys.exit(found != expected)

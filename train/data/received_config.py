"""``config.yaml`` of a run that may be anybody's: plain values, read and nothing more.

Hydra's own loader would resolve ``${oc.env:SECRET}`` in it. Here a file is text of bounded size without aliases (a few
of which make a billion values), and interpolations stay the text they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...models.received import read_bytes

MAX_BYTES = 2 * 2**20


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases")
        return super().compose_node(parent, index)


def read_config(path: Path) -> dict[str, Any]:
    """The values of a ``config.yaml``.

    Raises:
        ValueError: it is no regular file, too large, nested too deeply, not YAML, has aliases, or is no mapping.
    """
    try:
        values = yaml.load(read_bytes(path, MAX_BYTES).decode("utf-8-sig"), Loader=_PlainLoader)
    except RecursionError:
        raise ValueError(f"{path} cannot be read as a configuration (nested too deeply).") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} cannot be read as a configuration ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} cannot be read as a configuration (it holds no mapping).")
    return values

"""The package of a checkout that nothing was installed from: with this folder's parent on the path, ``interloom`` is
the checkout's folders ``kernels`` and ``models``.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3])]

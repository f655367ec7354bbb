"""Imports of big libraries, without the garbage collector.

    with big_imports():
        from vllm import LLM

Importing torch, transformers or vLLM makes hundreds of thousands of objects that live as long as the process. Python's
collector walks all of them every time they have grown by a quarter, and once more when the process ends: a third of the
time an import takes, and seconds at the end.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def big_imports() -> Iterator[None]:
    """Nothing is collected inside; whatever is there at the end is kept, and never walked again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()

"""Child process of diagnose: load torch's and then vLLM's compiled code, and say what became of it.

    python load_libraries.py /path/to/site-packages/vllm [--whole-torch]

Importing vLLM takes six seconds, and passes even where its library does not load; this takes half a second and tells
why. torch's compiled core is enough to load a library against; where it does not come up alone, torch is imported.
The last line is one JSON object: torch_error, errors {library: reason}, operators, missing [operator], flash_attn.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

NAMESPACE = "_C::"
_CALLS = r"torch\.ops\._C\.(\w+)"
_NEEDED_IN = ("v1/worker/cpu_worker.py",)
"""Modules of the CPU build whose operators are called on every start, without a look whether they are there."""

_WIDE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


def main(root: Path, *, whole: bool) -> dict[str, Any]:
    """Load what is below `root`, the package's directory. whole: import all of torch."""
    told: dict[str, Any] = {"torch_error": "", "errors": {}, "operators": 0, "missing": [], "flash_attn": ""}
    try:
        core = importlib.import_module("torch")._C if whole else _torch_core()
    except BaseException as error:
        if whole:
            return {**told, "torch_error": _one_line(error)}
        os.execv(sys.executable, [sys.executable, __file__, str(root), "--whole-torch"])
    libraries = libraries_for(root, _processor_flags())
    if not libraries:
        told["errors"]["_C"] = f"there is no compiled library in {root}"
    told["errors"].update({library.name: error for library in libraries for error in [_load(library)] if error})
    names = {name for name in core._dispatch_get_all_op_names() if name.startswith(NAMESPACE)}
    told["operators"] = len(names)
    told["missing"] = [] if told["errors"] else [name for name in called(root) if NAMESPACE + name not in names]
    flash = [path for entry in sys.path for path in Path(entry or ".").glob("flash_attn_2_cuda*.so")]
    told["flash_attn"] = _load(flash[0]) if flash else ""
    return told


def _torch_core() -> Any:
    """torch._C without torch's Python code, which takes three quarters of the import."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    ctypes.CDLL(str(root / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    package = types.ModuleType("torch")
    package.__path__ = [str(root)]
    sys.modules["torch"] = package
    return importlib.import_module("torch._C")


def libraries_for(root: Path, flags: set[str]) -> list[Path]:
    """What vLLM loads on a processor with these flags: its CPU build has a library for each kind."""
    found = {path.name.partition(".")[0]: path for path in sorted(root.glob("_C*.so"))}
    if "_C_AVX2" in found:
        kind = ("_C" if "avx512_bf16" in flags else "_C_AVX512") if flags >= _WIDE else "_C_AVX2"
        return [found.get(kind, found["_C_AVX2"])]
    return list(found.values())


def called(root: Path) -> list[str]:
    """Operators that the CPU worker calls; a CUDA build, known by more libraries, does not register them."""
    if any(root.glob("_moe_C*.so")):
        return []
    texts = ((root / name).read_text(encoding="utf-8") for name in _NEEDED_IN if (root / name).is_file())
    return sorted({name for text in texts for name in re.findall(_CALLS, text)})


def _processor_flags() -> set[str]:
    try:
        match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        match = None
    return set(match.group(1).split()) if match else set()


def _load(library: Path) -> str:
    """Why a library does not load; empty if it does."""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return _one_line(error)
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are not to be found by their names
    result = main(Path(sys.argv[1]), whole="--whole-torch" in sys.argv)
    print(json.dumps(result), flush=True)
    os._exit(0)  # torch's own end takes a while, and is of no use

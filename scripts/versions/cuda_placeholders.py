"""Stand-ins for the CUDA libraries that a CUDA build of PyTorch is linked with, for a machine that has no GPU.

PyPI has no CPU builds of PyTorch. A CUDA build does the same work on a CPU, but the loader wants gigabytes of NVIDIA's
libraries first. A stand-in has the name, the symbols and the symbol versions of such a library, and every function in
it answers "no CUDA device", which is what PyTorch asks. Needs gcc, readelf and nm.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from .command import VersionsError

CUDA = re.compile(r"_?(cu|nv|nccl)", re.IGNORECASE)
OPENED_LATE = ("libcaffe2_nvrtc", "libtorch_cuda_linalg")
"""Libraries of PyTorch's that are opened only once there is a GPU."""
NO_DEVICE = 100
"""cudaErrorNoDevice."""
TEXT = re.compile(r"Get(Error|Status)(String|Name)$|^ncclGetLastError$")
"""Functions that return a string: a number would be taken for its address."""


@dataclass(slots=True)
class Linkage:
    """What libraries need of others. versions: by library. wanted: symbol and version ("" if none)."""

    needed: set[str] = field(default_factory=set)
    versions: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    wanted: set[tuple[str, str]] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)


def write(libraries: Path) -> list[str]:
    """Write what torch/lib lacks beside what is there; returns the names of the files."""
    own = sorted(libraries.glob("*.so*"))
    linkage = read(library for library in own if not library.name.startswith(OPENED_LATE))
    missing = {name for name in linkage.needed if CUDA.match(name.removeprefix("lib"))} - {file.name for file in own}
    for name, symbols in share_out(linkage, missing).items():
        compile_stand_in(libraries / name, symbols, linkage.versions[name])
    return sorted(missing)


def read(libraries: Iterable[Path]) -> Linkage:
    """The linkage of all of them together."""
    found = Linkage()
    for library in libraries:
        found.needed |= set(re.findall(r"NEEDED.*\[(.+?)\]", output("readelf", "--dynamic", "--wide", str(library))))
        section = output("readelf", "--version-info", "--wide", str(library))
        for file in re.split(r"\bFile: ", section)[1:]:
            found.versions[file.split()[0]] |= set(re.findall(r"Name: (\S+)\s+Flags", file))
        for line in output("nm", "--dynamic", str(library)).splitlines():
            kind, symbol = line.split()[-2:]
            name, _, version = symbol.partition("@")
            if kind == "U":
                found.wanted.add((name, version.lstrip("@")))
            elif kind not in "wv":
                found.defined.add(name)
    return found


def share_out(linkage: Linkage, missing: set[str]) -> dict[str, set[tuple[str, str]]]:
    """Which stand-in gets which symbols. Those without a version may lie anywhere: in one that has no versions."""
    owner = {version: name for name in missing for version in linkage.versions[name]}
    shares: dict[str, set[tuple[str, str]]] = {name: set() for name in missing}
    rest = next((name for name in sorted(missing) if not linkage.versions[name]), None)
    for symbol, version in linkage.wanted:
        if version in owner:
            shares[owner[version]].add((symbol, version))
        elif rest and not version and symbol not in linkage.defined and CUDA.match(symbol):
            shares[rest].add((symbol, version))
    return shares


def compile_stand_in(target: Path, symbols: set[tuple[str, str]], versions: set[str]) -> None:
    """Compile one shared library."""
    functions = [
        f'const char *{name}(void) {{ return "no CUDA"; }}'
        if TEXT.search(name)
        else f"int {name}(void) {{ return {NO_DEVICE}; }}"
        for name, _ in sorted(symbols)
    ]
    nodes = []
    for version in sorted(versions):
        names = " ".join(f"{name};" for name, of in sorted(symbols) if of == version)
        nodes.append(f"{version} {{ {f'global: {names}' if names else ''} }};")
    with TemporaryDirectory() as directory:
        source, script = Path(directory) / "stand_in.c", Path(directory) / "versions"
        source.write_text("\n".join([*functions, ""]), encoding="utf-8")
        script.write_text("\n".join(nodes), encoding="utf-8")
        scripts = [f"-Wl,--version-script={script}"] if nodes else []
        soname = f"-Wl,-soname,{target.name}"
        output("gcc", "-w", "-shared", "-fPIC", "-fno-builtin", soname, *scripts, "-o", str(target), str(source))


def output(*command: str) -> str:
    """What a tool of the compiler's prints. Raises VersionsError where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise VersionsError(f"{command[0]} is missing; install gcc and binutils") from None
    except subprocess.CalledProcessError as error:
        raise VersionsError(f"{command[0]} failed: {error.stderr.strip()[-300:]}") from None

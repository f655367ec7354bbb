"""Makes a needed symbol version of a shared library optional: the loader then warns where it would have refused.

Some wheels of vLLM's older CPU builds say that they run with any libstdc++, and ask for one of GCC 13's symbol versions
for a symbol they never look up. One flag in the version table of the file is what this changes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

NEEDED_VERSIONS = 0x6FFFFFFE
"""SHT_GNU_verneed, the type of the section."""
WEAK = 0x2
"""VER_FLG_WEAK."""


def make_optional(library: Path, version: str) -> bool:
    """Set the flag of `version` in a 64-bit little-endian ELF file; returns whether the file asks for that version."""
    data = bytearray(library.read_bytes())
    found = False
    for entry, name in needed_versions(data):
        if name == version:
            (flags,) = struct.unpack_from("<H", data, entry + 4)
            struct.pack_into("<H", data, entry + 4, flags | WEAK)
            found = True
    if found:
        library.write_bytes(data)
    return found


def needed_versions(data: bytearray) -> Iterator[tuple[int, str]]:
    """Position and name of each Vernaux entry (System V ABI; LSB, "Symbol Versioning")."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + size * number) for number in range(count)]
    for _, kind, _, _, position, _, link, entries, _, _ in sections:
        if kind != NEEDED_VERSIONS:
            continue
        strings = sections[link][4]
        for _ in range(entries):
            _, versions, _, first, following = struct.unpack_from("<HHIII", data, position)
            entry = position + first
            for _ in range(versions):
                _, _, _, name, after = struct.unpack_from("<IHHII", data, entry)
                yield entry, data[strings + name : data.index(0, strings + name)].decode()
                entry += after
            position += following

"""Subcommand sources: the Python files that the seam reads, of many releases, without their gigabytes of binaries."""

from __future__ import annotations

import re
import shutil
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from pathlib import Path
from zipfile import BadZipFile

from rich.console import Console
from subcommands import Command

from . import index, releases, remote
from .command import CACHE, VersionsError

SOURCES = CACHE / "sources"
THREADS = 8

WANTED = re.compile(
    r"vllm/("
    r"__init__|_version|envs|logprobs|outputs|sampling_params|pooling_params|sequence|forward_context|config|utils"
    r"|(config|utils|inputs|entrypoints|executor|worker|platforms|device_allocator|engine|plugins)/.*"
    r"|distributed/(parallel_state|weight_transfer/.*)"
    r"|v1/(outputs|request|serial_utils|[\w/]*metrics/.*|(engine|worker|sample|executor|core)/.*)"
    r"|model_executor/(utils|sampling_metadata|model_loader/.*|models/(qwen2|llama|interfaces_base))"
    r"|model_executor/layers/(__init__|utils|linear|sampler|vocab_parallel_embedding|logits_processor"
    r"|fused_moe/.*(layer|unquantized)\w*)"
    r")\.py"
)
"""Beside what the seam itself imports: what it assumes about meaning is checked in the text of these files."""


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="default: every release from 0.7.0 on")


def run(options: Namespace, console: Console) -> int:
    """Download what is not there yet; status 1 if a version failed."""
    versions = releases.parse(options.versions, releases.CONTRACT)
    missing = [version for version in versions if not directory(version).is_dir()]
    if len(missing) < len(versions):
        console.print(f"{len(versions) - len(missing)} of {len(versions)} versions are there already")
    failed = 0
    certificates = index.certificates() if missing else None
    with ThreadPoolExecutor(THREADS) as pool:
        downloads = {pool.submit(fetch, version, certificates): version for version in missing}
        for done in as_completed(downloads):
            try:
                console.print(f"{downloads[done]}: {done.result()} files")
            except (VersionsError, OSError, HTTPException, BadZipFile) as error:
                failed += 1
                console.print(f"[red]{downloads[done]}[/red]: {error}", soft_wrap=True)
    return 1 if failed else 0


def directory(version: str) -> Path:
    """Where a version's sources lie; below it the package `vllm`."""
    return SOURCES / version


def available() -> list[str]:
    """Versions whose sources are there, oldest first."""
    return releases.parse((path.parent.name for path in SOURCES.glob("[0-9]*/vllm")), ())


def fetch(version: str, certificates: str | None) -> int:
    """Download one version's sources; returns the number of files. The directory appears when it is complete."""
    wheel = index.find("vllm", version)
    unfinished = SOURCES / f".{version}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with remote.open_zip(wheel.url, certificates) as archive:
        members = sorted(
            (member for member in archive.infolist() if WANTED.fullmatch(member.filename)),
            key=lambda member: member.header_offset,  # neighbours one after another, for few requests
        )
        for member in members:
            archive.extract(member, unfinished)
    if not members:
        raise VersionsError(f"{wheel.url} holds none of the files that are wanted")
    unfinished.rename(directory(version))
    return len(members)


COMMAND = Command("sources", "download the Python sources of releases", add_options, run)

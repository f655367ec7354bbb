"""Subcommand logprobs: memory and time of log-probs and entropies, in chunks as training computes them, and at once.

Each way runs in a process of its own, forward and backward; memory is what the process took beyond its inputs and
their gradients.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from subcommands import Command
from torch import Tensor

from workers.engines.logprobs import token_logprobs
from workers.shortage import peak_resident_bytes

from . import floors, launch

VOCABULARY = 151_936
"""Of Qwen2."""
TEMPERATURE = 0.7


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    launch.add_common_options(parser, out="logprobs.json")
    parser.add_argument("--rows", type=int, default=512, help="response tokens (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="size of hidden states (default: %(default)s)")
    parser.add_argument(
        "--chunks", default="16,32,64,128", help="rows at a time, with commas between (default: %(default)s)"
    )


def run(options: Namespace, console: Console) -> int:
    """Measure, write, show and check."""
    chunks = [int(chunk) for chunk in options.chunks.split(",")]
    sizes = [(options.rows, chunk) for chunk in chunks] + [(2 * options.rows, chunks[0])]
    chunked = [_alone(rows, options.hidden, chunk) for rows, chunk in sizes]
    formula = _alone(options.rows, options.hidden, None)
    result = {
        "benchmark": "logprobs",
        "command": launch.command_line(),
        "commit": launch.commit(),
        "machine": launch.machine(),
        "logits_bytes": 4 * options.rows * VOCABULARY,
        "formula": formula,
        "chunked": chunked,
        "error": max(abs(entry["sum"] - formula["sum"]) / abs(formula["sum"]) for entry in chunked[:-1]),
        "smallest_over_logits": chunked[0]["bytes"] / (4 * options.rows * VOCABULARY),
        "twice_the_rows": chunked[-1]["bytes"] / chunked[0]["bytes"],
    }
    lacking = floors.missed(result, floors.LOGPROBS)
    launch.write(options.out, result | {"missed": lacking})
    console.print(table(result))
    for line in lacking:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if lacking and options.check else 0


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    shown = Table(title=f"Log-probs and entropies, vocabulary {VOCABULARY:,}", title_justify="left", box=None)
    for name in ("way", "rows", "MiB", "seconds"):
        shown.add_column(name, justify="left" if name == "way" else "right")
    for entry in [result["formula"], *result["chunked"]]:
        way = "the formula" if entry["chunk"] is None else f"chunks of {entry['chunk']}"
        shown.add_row(way, str(entry["rows"]), f"{entry['bytes'] / 2**20:,.0f}", f"{entry['seconds']:.2f}")
    shown.add_row("logits alone", str(result["formula"]["rows"]), f"{result['logits_bytes'] / 2**20:,.0f}", "")
    return shown


def _alone(rows: int, hidden: int, chunk: int | None) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, rows, hidden, chunk).result()


def measure(rows: int, hidden: int, chunk: int | None) -> dict[str, Any]:
    """One forward and backward pass. chunk: rows at a time; None: the formula, with all logits in memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    states = torch.randn(rows, hidden, device=device, requires_grad=True)
    weight = (torch.randn(VOCABULARY, hidden, device=device) * hidden**-0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), device=device)
    states.grad, weight.grad = torch.zeros_like(states), torch.zeros_like(weight)
    (_compute(states[:2], weight, targets[:2], 1) if chunk else _formula(states[:2], weight, targets[:2])).backward()
    before = _peak(device)
    began = time.perf_counter()
    total = _compute(states, weight, targets, chunk) if chunk else _formula(states, weight, targets)
    total.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "rows": rows,
        "chunk": chunk,
        "sum": total.item(),
        "bytes": _peak(device) - before,
        "seconds": seconds,
    }


def _compute(states: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    logprobs, entropy = token_logprobs(states, weight, targets, temperature=TEMPERATURE, entropy=True, chunk=chunk)
    assert entropy is not None
    return logprobs.double().sum() + entropy.double().sum()


def _formula(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = torch.log_softmax(states @ weight.t() / TEMPERATURE, dim=-1)
    chosen = logp.gather(-1, targets[:, None]).double().sum()
    return chosen - (logp.exp() * logp).sum(-1).double().sum()


def _peak(device: str) -> int:
    """Most memory so far, bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


COMMAND = Command("logprobs", "memory of log-probs and entropies: chunks against the whole logits", add_options, run)

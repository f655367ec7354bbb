"""Subcommand logprobs: memory and time of log-probs and entropies, in chunks as training computes them, and at once.

Forward and backward; memory is what was allocated beyond the inputs and their gradients.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from subcommands import Command
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from workers.engines.logprobs import token_logprobs

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
    chunked = [measure(rows, options.hidden, chunk) for rows, chunk in sizes]
    formula = measure(options.rows, options.hidden, None)
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


def measure(rows: int, hidden: int, chunk: int | None) -> dict[str, Any]:
    """One forward and backward pass. chunk: rows at a time; None: the formula, with all logits in memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    states = torch.randn(rows, hidden, device=device, requires_grad=True)
    weight = (torch.randn(VOCABULARY, hidden, device=device) * hidden**-0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), device=device)
    states.grad, weight.grad = torch.zeros_like(states), torch.zeros_like(weight)
    (_compute(states[:2], weight, targets[:2], 1) if chunk else _formula(states[:2], weight, targets[:2])).backward()

    def work() -> Tensor:
        total = _compute(states, weight, targets, chunk) if chunk else _formula(states, weight, targets)
        total.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return total.detach()

    began = time.perf_counter()
    total = work()
    seconds = time.perf_counter() - began
    return {
        "rows": rows,
        "chunk": chunk,
        "sum": total.item(),
        "bytes": _peak_on_gpu(work) if device == "cuda" else _peak_on_cpu(work),
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


def _peak_on_gpu(work: Callable[[], object]) -> int:
    """Most bytes allocated at a time beyond those before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(work: Callable[[], object]) -> int:
    """Likewise, of what PyTorch allocates: a resident set would also count what the C library keeps or gives back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(changes, key=itemgetter(0))))


COMMAND = Command("logprobs", "memory of log-probs and entropies: chunks against the whole logits", add_options, run)

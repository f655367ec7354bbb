"""Subcommand w1: one GRPO step at real scale on one GPU, phase by phase, or a part of it.

    python scripts/benchmark.py w1                      # steps, as a user would run them
    python scripts/benchmark.py w1 --sampler-logprobs   # the same with the sampler's log-probs of every response
    python scripts/benchmark.py w1 --shape 7b --rollout-only    # generation: CUDA graphs against eager
    python scripts/benchmark.py w1 --shape 7b --sync-only       # sleep, wake and weight sync

64 prompts of 256 tokens x 8 responses of 1,024 tokens (ignore_eos), half of each with the 7b shape; one update per
step, reference model with KL loss, bfloat16 compute, float32 master weights, AdamW; a model of Qwen2.5's shape with
random weights, which takes as long as a trained one. `--shape tiny` is the same program on a CPU.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console
from subcommands import Command

from trainer.tracking.summary import versions

from . import floors, launch, w1_rollout, w1_step, w1_sync
from .w1_model import write_inputs
from .w1_work import SHAPES

PARTS = {"step": w1_step, "sync": w1_sync, "rollout": w1_rollout}


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    launch.add_common_options(parser, out="w1.json")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b", help="of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="training steps; the first is not counted")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--sampler-logprobs", action="store_true", help="of every response, not of one in eight")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--sync-only", dest="part", action="store_const", const="sync", help="sleep, wake and weight sync; no training"
    )
    parts.add_argument(
        "--rollout-only",
        dest="part",
        action="store_const",
        const="rollout",
        help="generation with CUDA graphs and without (--eager: only without), with log-probs of one response in "
        "eight and of all (--sampler-logprobs: only of all); no training",
    )
    parser.set_defaults(part="step")
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"of --sync-only ({w1_sync.ROUNDS}) or --rollout-only ({w1_rollout.ROUNDS}), after one not counted",
    )


def run(options: Namespace, console: Console) -> int:
    """Measure, write, show and check."""
    shape, part = SHAPES[options.shape], PARTS[options.part]
    model = launch.ROOT / ".cache" / "benchmarks" / f"qwen2-{options.shape}"
    write_inputs(shape, model)
    result = {
        "benchmark": "w1",
        "part": options.part,
        "shape": options.shape,
        "command": launch.command_line(),
        "commit": launch.commit(),
        "versions": versions(),
        "machine": launch.machine(),
        **part.measure(shape, model, options, console),
    }
    lacking = floors.missed(result, floors.w1(result))
    launch.write(options.out, result | {"missed": lacking})
    console.print(part.table(result))
    for line in lacking:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if lacking and options.check else 0


COMMAND = Command("w1", "one GRPO step at real scale on one GPU, phase by phase", add_options, run)

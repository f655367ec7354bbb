"""w1 --sync-only: the weight sync of a step, with sleep and wake, and nothing else. No training, no generation.

The program's own trainer ranks, replicas and buckets; without a reference, which takes memory and no part in it.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from trainer.actors import start_workers
from trainer.driver import Driver
from trainer.setup import build
from trainer.specs import sizes
from trainer.tracking.phases import Phases
from workers.sync.sync import SyncReport

from .measure import Result
from .w1_model import write_weights
from .w1_parts import bench
from .w1_work import Shape, overrides

ROUNDS = 5
PARTS = {"sleep": "sleep", "wake_weights": "wake, weights", "sync": "sync", "wake_cache": "wake, KV cache"}


def measure(shape: Shape, model: Path, options: Namespace, console: Console) -> Result:
    """Seconds of each part and round but the first, and what was sent in one sync. verified: by checksums that agreed.

    seconds: what stands between an update and weights that can generate: their memory taken again, and the sync.
    """
    write_weights(model, console)
    began = time.perf_counter()
    settings = [*overrides(shape, model, options), "actor_rollout_ref.actor.use_kl_loss=false"]
    with bench("w1-sync", settings) as prepared:
        cfg, inputs = prepared.cfg, prepared.inputs
        workers = start_workers(cfg, inputs, prepared.cluster)
        phases = Phases()
        driver = build(cfg, inputs, workers, sizes(cfg, inputs), phases, prepared.sampling)
        startup_seconds = time.perf_counter() - began
        rounds = [_round(driver, phases, number) for number in range(1 + (options.rounds or ROUNDS))]
    report = rounds[-1][1]
    seconds = {part: [times[part] for times, _ in rounds[1:]] for part in PARTS}
    medians = {part: median(values) for part, values in seconds.items()}
    return {
        "channel": workers.channel,
        "startup_seconds": startup_seconds,
        "parts": {part: {"median": medians[part], "rounds": seconds[part]} for part in PARTS},
        "seconds": median(a + b for a, b in zip(seconds["wake_weights"], seconds["sync"], strict=True)),
        "bytes": report.num_bytes,
        "gigabytes_per_second": report.num_bytes / medians["sync"] / 1e9,
        "parameters": report.parameters,
        "buckets": report.num_buckets,
        "bucket_megabytes": cfg.actor_rollout_ref.rollout.update_weights_bucket_megabytes,
        "verified": all(report.verified for _, report in rounds),
    }


def _round(driver: Driver, phases: Phases, number: int) -> tuple[dict[str, float], SyncReport]:
    """Seconds of each part, and what was sent."""
    phases.step(number)
    with phases("sleep"):
        driver.source.sleep()
    with phases("wake_weights"):
        driver.source.wake_weights()
    with phases("sync"):
        report = driver.sync.publish(1 + number)
    with phases("wake_cache"):
        driver.source.wake_cache()
    metrics = phases.metrics()
    return {part: metrics[f"time/{part}"] for part in PARTS}, report


def table(result: Result) -> Table:
    """The result for people."""
    title = f"W1, {result['shape']}: weights {result['seconds']:.3f} s"
    shown = Table(title=title, title_justify="left", box=None)
    shown.add_column("part")
    shown.add_column("seconds", justify="right")
    for part, name in PARTS.items():
        shown.add_row(name, f"{result['parts'][part]['median']:.3f}")
    shown.add_section()
    shown.add_row("through", result["channel"].replace("_", " "))
    shown.add_row("GB", f"{result['bytes'] / 1e9:.2f}")
    shown.add_row("GB per second", f"{result['gigabytes_per_second']:.1f}")
    shown.add_row("parameters", f"{result['parameters']}")
    shown.add_row(f"buckets of {result['bucket_megabytes']} MiB", f"{result['buckets']}")
    shown.add_row("checksums", "agreed" if result["verified"] else "not compared")
    shown.add_row("start-up", f"{result['startup_seconds']:.0f} s")
    return shown

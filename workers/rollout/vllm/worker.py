"""The worker class for vLLM 0.7, which cannot mix an extension into its own."""

from __future__ import annotations

from vllm.worker.worker import Worker  # type: ignore[import-not-found,unused-ignore]

from workers.rollout.vllm import patches
from workers.rollout.vllm.extension import TandemWorkerExtension

patches.apply()  # in every process that runs a worker


class TandemWorker(TandemWorkerExtension, Worker):  # type: ignore[misc,unused-ignore]
    """vLLM 0.7's worker with our methods."""

"""What Tandem does with the installed vLLM, in words; and the nearest combination that is known to work."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.diagnosis import database, versions
from trainer.diagnosis.facts import Facts


@dataclass(frozen=True)
class Combination:
    """Projects that go together. parts: project -> range, for pip. proven: how we know. installed: it is here."""

    parts: dict[str, str]
    proven: str
    installed: bool

    def told(self) -> str:
        """As one line."""
        text = ", ".join(f"{name} {wanted.replace('==', '')}" for name, wanted in self.parts.items())
        return f"{text} ({self.proven})"


def nearest(facts: Facts) -> Combination:
    """The combination nearest to what is installed that has been run for real."""
    known = database.load()
    release = known.nearest(facts.vllm.version, facts.device, facts.python_version)
    parts = release.parts(facts.device) | {"ray": known.tandem["ray"]}
    found = {name: facts.version(name) for name in parts}
    if facts.torch is not None:
        found["torch"] = facts.torch.version
    installed = versions.available() and all(_has(found[name], wanted) for name, wanted in parts.items())
    return Combination(parts, known.proven[release.proven], installed)


def _has(found: str | None, wanted: str) -> bool:
    return found is not None and versions.inside(found, wanted)


def choices(facts: Facts) -> list[tuple[str, str]]:
    """(what, how Tandem does it with this version); nothing where the version could not be looked at."""
    can = facts.vllm.capabilities
    if can is None:
        return []
    cpu = facts.device == "cpu"
    graphs = "kinds can be chosen (cudagraph_mode)" if can.cudagraph_mode else "on or off (enforce_eager)"
    logprobs = "those of what is sampled" if can.sampled_logprobs and can.processed_logprobs else "before temperature"
    keeps = "restored by vLLM" if can.sleep_keeps_buffers else "saved and restored by Tandem"
    wake = "weights and KV cache apart" if can.wake_tags else "all at once"
    early = "; the scheduler wakes with the weights, so no request waits then" if can.wakes_scheduler_early else ""
    loading = (
        "plain, parameters kept real"
        if cpu and can.cpu_gemm_dispatch
        else "layer by layer where a layer was laid out anew"
    )
    return [
        ("engine", ("V0" if can.v0_engine else "V1") + ", in the replica's own process"),
        ("worker", "extension mixed in by vLLM" if can.worker_extension else "a worker class of Tandem's"),
        ("weight loading", loading if can.layerwise_reload or cpu else "plain"),
        ("log-probs", f"{logprobs}, {'flat lists' if can.flat_logprobs else 'an object per token'}"),
        ("sleep", "none on a CPU" if cpu else f"buffers {keeps}; wakes {wake}{early}"),
        ("CUDA graphs", "none on a CPU" if cpu else graphs),
        ("attention", "attention_backend argument" if can.attention_argument else "VLLM_ATTENTION_BACKEND"),
    ]

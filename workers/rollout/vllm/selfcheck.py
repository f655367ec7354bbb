"""Does the installed vLLM do here what training needs? A tiny model, built, sampled, updated and compared.

    python -m workers.rollout.vllm.selfcheck [--json] [--device cpu|cuda]

Every check runs the seam as a replica does, and holds it against a plain forward of the same weights in transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from workers.protocol import IntArray, RolloutBlock
from workers.rollout.spec import RolloutSpec, SamplingSpec
from workers.rollout.vllm.arguments import fit_sampling, plan_engine
from workers.rollout.vllm.capabilities import Capabilities, of_installed
from workers.rollout.vllm.engine import Engine
from workers.rollout.vllm.outputs import to_block
from workers.sync.buckets import BucketWriter

TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}
"""Largest mean difference of log-probs: float32 on a CPU, bfloat16 on a GPU."""

SAMPLING = SamplingSpec(
    n=2, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=12, ignore_eos=True, stop_token_ids=(), logprobs="all"
)


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is as training needs it, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass
class Bench:
    """An engine and the model it should agree with."""

    engine: Engine
    model: Any
    can: Capabilities
    device: Literal["cpu", "cuda"]
    generators_kept: bool

    def sample(self, sampling: SamplingSpec = SAMPLING) -> RolloutBlock:
        """Responses to three prompts of different lengths."""
        finished = self.engine.generate(prompts(), [0, 1, 2], sampling)
        return to_block([output for some in finished for output in some], weight_version=0)

    def difference(self, sampling: SamplingSpec = SAMPLING, temperature: float | None = None) -> float:
        """Mean absolute difference between the sampler's log-probs and the model's at this temperature."""
        block = self.sample(sampling)
        assert block.logprobs is not None
        expected = self.logprobs(block, sampling.temperature if temperature is None else temperature)
        return float(np.abs(block.logprobs - expected).mean())

    def logprobs(self, block: RolloutBlock, temperature: float) -> np.ndarray[Any, Any]:
        """The model's log-probs of the sampled tokens, [total response tokens]."""
        found = []
        for prompt, response in zip(block.prompts(), block.responses(), strict=True):
            ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
            with torch.no_grad():
                logits = self.model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
            found.append(torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0])
        return torch.cat(found).numpy()

    def update(self) -> None:
        """New random weights for both, through the weight sync. Raises AssertionError if they did not arrive whole."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        publisher = BucketWriter("float32" if self.device == "cpu" else "bfloat16", bucket_bytes=1 << 16)
        shards = [(n, p.detach(), tuple(p.shape), 0, 0) for n, p in self.model.named_parameters()]
        self.engine.rpc("tandem_begin_update")
        sent = 0
        for number in range(publisher.num_buckets(shards)):
            bucket = publisher.write(shards, number)
            sent += bucket.checksum
            self.engine.rpc("tandem_load_bucket", [bucket.as_message()])
        held = self.engine.rpc("tandem_finish_update")[0]["checksum"]
        self.engine.forget_prefixes()
        assert sent % (1 << 64) == held, f"checksum of the weights sent {sent % (1 << 64)}, held {held}"


def prompts() -> list[IntArray]:
    """Three prompts of the tiny model's tokens."""
    return [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 9, 17)]


def write_tiny_model(directory: Path) -> Any:
    """A random Qwen2 with tied embeddings, saved where vLLM can read it; returned in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def tiny_spec(model: Path, device: Literal["cpu", "cuda"]) -> RolloutSpec:
    """Settings of one small engine on it."""
    return RolloutSpec(
        model_path=str(model),
        tokenizer_path=str(model),
        trust_remote_code=False,
        override_config={},
        device=device,
        devices=(0,) if device == "cuda" else (),
        tensor_parallel_size=1,
        dtype="float32" if device == "cpu" else "bfloat16",
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        enforce_eager=False,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        gpu_memory_utilization=0.3,
        kv_cache_gb=1.0 if device == "cpu" else None,
        free_cache_engine=True,
        sleep_level="auto",
        load_format="auto",
        seed=7,
        threads=1,
    )


def build(directory: Path, device: Literal["cpu", "cuda"]) -> Bench:
    """The tiny model and an engine on it. Raises ValueError if the settings cannot work on this version."""
    can = of_installed(device)
    plan = plan_engine(tiny_spec(directory, device), can, os.environ)
    if plan.problems:
        raise ValueError("; ".join(plan.problems))
    model = write_tiny_model(directory)
    before = _drawn()
    engine = Engine(plan, can)
    return Bench(engine, model, can, device, generators_kept=before == _drawn())


def check_logprobs(bench: Bench) -> str:
    """Samples, and compares with transformers."""
    return _close(bench, bench.difference(), "mean difference of log-probs to transformers")


def check_temperature(bench: Bench) -> str:
    """Log-probs at another temperature are the sampler's, or this version's settings are refused."""
    warm = replace(SAMPLING, temperature=0.6)
    _, _, problem = fit_sampling(warm, bench.can, auto_adapt=False)
    if problem is None:
        return _close(bench, bench.difference(warm), "mean difference at temperature 0.6")
    unscaled = bench.difference(warm, temperature=1.0)
    _close(bench, unscaled, "mean difference to log-probs before temperature")
    return "log-probs are from before temperature, as known of this version; refused at temperatures other than 1"


def check_update(bench: Bench) -> str:
    """New weights arrive whole, and the next output comes from them."""
    before = bench.sample(replace(SAMPLING, temperature=0.0, n=1)).response_ids
    bench.update()
    after = bench.sample(replace(SAMPLING, temperature=0.0, n=1)).response_ids
    assert not np.array_equal(before, after), "the output after the update is that of the old weights"
    return _close(bench, bench.difference(), "weights exact; mean difference after the update")


def check_sleep(bench: Bench) -> str:
    """Sleep, wake the weights, update, wake the cache: the order of a training step."""
    engine = bench.engine
    engine.sleep(2)
    _must_refuse(bench, "asleep")
    engine.wake("weights")
    bench.update()
    if bench.can.wake_tags:
        _must_refuse(bench, "half awake")
    engine.wake("kv_cache")
    return _close(bench, bench.difference(), "sleep 2, wake, update, wake; mean difference")


def check_generators(bench: Bench) -> str:
    """Building an engine left this process's random numbers alone."""
    assert bench.generators_kept, "building the engine reseeded this process's random generators"
    return "Python's, NumPy's and PyTorch's are as they were"


def check_rpc(bench: Bench) -> str:
    """A tensor in an RPC is refused before it is sent."""
    try:
        bench.engine.rpc("tandem_seed", torch.zeros(1))
    except TypeError:
        return "tensors are refused"
    raise AssertionError("a tensor was sent over vLLM's RPC")


CHECKS: dict[str, Callable[[Bench], str]] = {
    "random generators": check_generators,
    "log-probs": check_logprobs,
    "temperature": check_temperature,
    "weight update": check_update,
    "sleep and wake": check_sleep,
    "plain RPC": check_rpc,
}


def run(device: Literal["cpu", "cuda"]) -> list[Check]:
    """All checks, in order; a failure to build is the only one then."""
    with tempfile.TemporaryDirectory(prefix="tandem-selfcheck-") as directory:
        try:
            bench = build(Path(directory), device)
        except Exception as error:
            return [Check("engine", False, f"{type(error).__name__}: {error}")]
        done = [Check("engine", True, f"vLLM {bench.can.version}, {device}")]
        return done + [_run_one(name, check, bench) for name, check in CHECKS.items()]


def _drawn() -> tuple[float, float, float]:
    """The next number of each of this process's generators, which stay as they are."""
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = random.random(), float(np.random.random()), float(torch.rand(()))
    random.setstate(python)
    np.random.set_state(array)
    torch.set_rng_state(tensor)
    return numbers


def _run_one(name: str, check: Callable[[Bench], str], bench: Bench) -> Check:
    try:
        return Check(name, True, check(bench))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _close(bench: Bench, difference: float, what: str) -> str:
    assert difference < TOLERANCE[bench.device], f"{what}: {difference:.2g}"
    return f"{what}: {difference:.2g}"


def _must_refuse(bench: Bench, state: str) -> None:
    try:
        bench.sample()
    except RuntimeError:
        return
    raise AssertionError(f"generate ran while {state}")


def main() -> int:
    """Runs the checks and prints them; the last line is JSON with --json. Exit status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    options = parser.parse_args()
    checks = run(options.device)
    if options.json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            print(f"{'ok    ' if check.ok else 'BROKEN'}  {check.name}: {check.detail}")
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

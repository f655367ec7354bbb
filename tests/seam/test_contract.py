"""The seam's assumptions against the real sources of every vLLM release: python scripts/vllm_versions.py contract

Not part of an ordinary run: it needs sources that the command above downloads (marker `contract`). A release that is
not there makes it fail, as nobody runs it by accident.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.version import Version
from release_facts import ARGUMENTS, COMBINED, FACTS, LLM, V0_WORKER, V1_WORKER, uses_v0
from release_sources import Release, comes_before

from scripts.versions.arguments import TABLE
from scripts.versions.releases import CONTRACT, parse
from scripts.versions.sources import available
from workers.protocol import FINISH_REASONS
from workers.rollout.vllm import patches
from workers.rollout.vllm.capabilities import Capabilities, look_up
from workers.rollout.vllm.installed import Sources

pytestmark = pytest.mark.contract

SEAM = Path(patches.__file__).parent
COMMAND = "python scripts/vllm_versions.py contract"
ENGINES = {"V0": "engine/llm_engine.py", "V1": "v1/engine/llm_engine.py"}
SCHEDULERS = ("v1/core/sched/scheduler.py", "v1/core/scheduler.py")
UTILS = "model_executor/layers/utils.py"
PACKERS = {
    "model_executor/layers/linear.py": "UnquantizedLinearMethod",
    "model_executor/layers/vocab_parallel_embedding.py": "UnquantizedEmbeddingMethod",
}

ALWAYS = """
model tokenizer skip_tokenizer_init trust_remote_code hf_overrides tensor_parallel_size distributed_executor_backend
dtype max_model_len max_num_seqs max_num_batched_tokens enforce_eager enable_prefix_caching enable_chunked_prefill
load_format seed disable_log_stats worker_cls generation_config gpu_memory_utilization enable_sleep_mode
"""
"""Arguments that are passed without looking whether there is such a one."""

SAMPLING = """
n temperature top_p top_k max_tokens ignore_eos stop_token_ids detokenize output_kind logprobs seed
"""


VALUES = {
    "model": ("org/model", 3),
    "dtype": ("bfloat16", 16),
    "tensor_parallel_size": (2, "two"),
    "max_model_len": (512, "long"),
    "max_num_seqs": (64, 0.5),
    "gpu_memory_utilization": (0.5, "half"),
    "enforce_eager": (True, "yes"),
    "enable_prefix_caching": (False, "yes"),
    "seed": (1, 1.5),
    "compilation_config": ({}, "fast"),
}
"""Of arguments that every release has: a value it takes, and one it does not."""


@pytest.fixture(scope="module", params=parse([*CONTRACT, *available()], CONTRACT))
def release(request: pytest.FixtureRequest) -> Release:
    """One release after another: what was read of one is dropped before the next."""
    found = Release(request.param)
    if not found.root.is_dir():
        pytest.fail(f"the sources of vLLM {request.param} are not here; run {COMMAND}", pytrace=False)
    return found


@pytest.fixture(scope="module")
def can(release: Release) -> Capabilities:
    return look_up(Sources(release.root), release.version)


def engine_path(release: Release) -> str:
    """The LLMEngine that runs, with our extension."""
    return ENGINES["V0" if uses_v0(release) else "V1"]


def test_sources_show_what_the_table_says(release: Release) -> None:
    wrong = [
        f"{fact.name}: the table says {fact.holds(release.version)}"
        for fact in FACTS
        if fact.shown_by(release) != fact.holds(release.version)
    ]
    assert not wrong


def test_capabilities_are_what_the_table_says(release: Release, can: Capabilities) -> None:
    expected = {fact.capability: fact.holds(release.version) for fact in FACTS if fact.capability}
    expected |= {name: value(release.version) for name, value in COMBINED.items()}
    assert {name: getattr(can, name) for name in expected} == expected
    assert can.known


def test_capabilities_hold_all_names(release: Release, can: Capabilities) -> None:
    assert can.engine_arguments == release.fields("EngineArgs", ARGUMENTS)
    sampling = {name for name in can.sampling_fields if not name.startswith("__")}  # marks of a base class
    assert sampling == release.fields("SamplingParams", "sampling_params.py")
    assert environment_variables(release) <= can.environment


def test_what_values_arguments_take(release: Release, can: Capabilities) -> None:
    assert can.kinds is not None
    for name, (good, bad) in VALUES.items():
        kind = can.kinds.of(name)
        assert kind is not None, name
        assert not list(kind.problems(good, name)), name
        assert len(list(kind.problems(bad, name))) == 1, name
    share = can.kinds.of("gpu_memory_utilization")
    assert share and bool(list(share.problems(1.5, "share"))) == (release.version >= Version("0.11.1"))


def environment_variables(release: Release) -> set[str]:
    """Keys of vLLM's table of variables."""
    for node in release.tree("envs.py").body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            names = {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
            if "VLLM_HOST_IP" in names:
                return names
    raise AssertionError("envs.py has no table of variables")


def test_arguments_we_always_pass_exist(release: Release) -> None:
    assert set(ALWAYS.split()) <= release.fields("EngineArgs", ARGUMENTS)
    variables = environment_variables(release)
    assert {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_CPU_KVCACHE_SPACE"} <= variables


def test_history_of_arguments(release: Release) -> None:
    if str(release) not in CONTRACT:
        return
    table: dict[str, tuple[str, str | None]] = json.loads(TABLE.read_text(encoding="utf-8"))
    names = {
        name
        for name, (first, last) in table.items()
        if Version(first) <= release.version and (last is None or release.version <= Version(last))
    }
    assert names == release.fields("EngineArgs", ARGUMENTS), "run python scripts/vllm_versions.py arguments"


def test_calls_to_llm(release: Release) -> None:
    """Names we pass exist, and what we leave out has a default."""
    calls = {"sleep": ["level"], "wake_up": [], "reset_prefix_cache": [], "collective_rpc": ["method", "args"]}
    for method, passed in calls.items():
        found = release.parameters(f"LLM.{method}", LLM)
        assert found is not None, method
        names, num_required = found
        assert set(passed) <= set(names), (method, names)
        assert set(names[:num_required]) <= set(passed), (method, names)
    assert "self.llm_engine = " in release.code("LLM.__init__", LLM)


def test_calls_to_the_engine(release: Release) -> None:
    path = engine_path(release)
    assert release.parameters("LLMEngine.step", path) == ([], 0)
    assert release.parameters("LLMEngine.has_unfinished_requests", path) == ([], 0)
    names, num_required = release.parameters("LLMEngine.add_request", path) or ([], 0)
    assert names[:3] == ["request_id", "prompt", "params"] and num_required <= 3
    names, num_required = release.parameters("LLMEngine.abort_request", path) or ([], 0)
    assert len(names) >= 1 and num_required == 1
    assert "self.model_config = " in release.text(path)
    assert release.defines(path.removesuffix(".py").replace("/", "."), "LLMEngine")


def test_executors_have_the_names_we_use(release: Release) -> None:
    chosen = release.code("LLMEngine._get_executor_cls", ENGINES["V0"])
    if not uses_v0(release):
        chosen = release.code("Executor.get_class", "v1/executor/abstract.py")
    for name in ("uni", "mp"):
        assert f"distributed_executor_backend == '{name}'" in chosen


def test_token_prompts_are_taken(release: Release) -> None:
    signature = release.code("LLMEngine.add_request", engine_path(release)).split("\n    ", 1)[0]
    assert "PromptType" in signature
    prompts = [p for p in release.files("inputs/*.py") if "prompt_token_ids" in release.fields("TokensPrompt", p)]
    assert prompts
    for path in ("v1/engine/processor.py", "v1/engine/input_processor.py"):  # raw prompts: a warning, never an error
        assert "raise" not in release.code("Processor.process_inputs", path).partition("raw prompts")[2][:120]


def test_calls_of_children_come_back_whole(release: Release) -> None:
    """n > 1, final output only: one output with all responses, under the name we gave."""
    if uses_v0(release):
        assert "RequestOutputKind.FINAL_ONLY" in release.code("RequestOutput.from_seq_group", "outputs.py")
        assert "request_id=request_id" in release.code("ParallelSampleSequenceGroup.add_request", "sequence.py")
        return
    code = release.code("ParentRequest.get_outputs", "v1/engine/parallel_sampling.py")
    assert "RequestOutputKind.FINAL_ONLY" in code and "[] if self.child_requests else self.output_aggregator" in code
    path = "v1/engine/output_processor.py"
    assert "final_only" in release.code("RequestState.make_request_output", path)
    assert "parent_requests" in release.code("OutputProcessor.abort_requests", path)
    assert "self.parent_requests: dict[str, ParentRequest]" in release.code("OutputProcessor.__init__", path)
    made = release.code("RequestState.make_request_output", path) + release.code(
        "OutputProcessor.process_outputs", path
    )
    assert "self.parent_req.external_req_id" in made or "self.parent_req.get_outputs(" in made


def test_finish_reasons_are_known(release: Release) -> None:
    if uses_v0(release):
        strings = re.findall(r"finish_reason = (['\"])(\w+)\1", release.text("sequence.py"))
        found = {name for _, name in strings}
    else:
        listed = release.text("v1/engine/__init__.py").partition("FINISH_REASON_STRINGS = ")[2]
        found = set(re.findall(r"\w+", listed.partition(")")[0]))
    assert {"stop", "length", "abort"} <= found <= set(FINISH_REASONS)


def test_sampling_parameters(release: Release) -> None:
    assert set(SAMPLING.split()) <= release.fields("SamplingParams", "sampling_params.py")
    kind = release.class_("RequestOutputKind", "sampling_params.py")
    assert kind and "FINAL_ONLY = " in ast.unparse(kind)
    outputs = release.fields("CompletionOutput", "outputs.py")
    assert {"index", "token_ids", "logprobs", "finish_reason"} <= outputs
    if "flat_logprobs" in release.fields("SamplingParams", "sampling_params.py"):
        assert {"start_indices", "logprobs"} <= release.fields("FlatLogprobs", "logprobs.py")


def test_scheduler_counters(release: Release) -> None:
    """What the replica's status reads in the engine core of its own process."""
    if uses_v0(release):
        return
    assert "self.engine_core = EngineCore(" in release.code("InprocClient.__init__", "v1/engine/core_client.py")
    assert "self.scheduler" in release.code("EngineCore.__init__", "v1/engine/core.py")
    code = release.code("Scheduler.__init__", *SCHEDULERS)
    for name in ("requests", "running", "waiting", "kv_cache_manager"):
        assert f"self.{name}" in code, name
    assert release.function("KVCacheManager.usage", "v1/core/kv_cache_manager.py")
    assert release.function("Request.num_output_tokens", "v1/request.py")
    assert "if not preempted_reqs" in release.code("Scheduler.schedule", *SCHEDULERS)
    assert "__len__" in release.text("v1/core/sched/request_queue.py") or "waiting: deque" in code


def test_the_model_is_reached_from_the_worker(release: Release) -> None:
    """`self.model_runner.model`, in the worker class that the platform chooses."""
    for path in (V0_WORKER if uses_v0(release) else V1_WORKER, "v1/worker/cpu_worker.py"):
        assert not release.files(path) or "self.model_runner" in release.text(path), path
    runner = "worker/model_runner.py" if uses_v0(release) else "v1/worker/gpu_model_runner.py"
    assert "self.model = " in release.text(runner) or "self.model: " in release.text(runner)


@cache
def extension_class() -> ast.ClassDef:
    """The source of what we mix into vLLM's worker."""
    source = ast.parse((SEAM / "extension.py").read_text(encoding="utf-8"))
    (found,) = (n for n in source.body if isinstance(n, ast.ClassDef) and n.name == "TandemWorkerExtension")
    return found


def test_what_the_extension_reads_of_the_worker(release: Release) -> None:
    """Nothing but these two: others (`device`, say) are None in some worker of some release."""
    read = {
        n.attr for n in ast.walk(extension_class()) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"
    }
    assert {name for name in read if not name.lstrip("_").startswith("tandem_")} == {"model_runner", "vllm_config"}
    bases = [path for path in ("worker/worker_base.py", "v1/worker/worker_base.py") if release.files(path)]
    assert any("self.vllm_config = vllm_config" in release.text(path) for path in bases), bases


def test_extension_names_are_free(release: Release) -> None:
    """vLLM asserts that no attribute of an extension is one of its worker's; releases add some all the time."""
    paths = [path for pattern in ("v1/worker/*worker*.py", "worker/*worker*.py") for path in release.files(pattern)]
    classes = {cls.name: cls for path in paths for cls in release.classes(path).values()}
    for worker in (cls for name, cls in classes.items() if name in ("Worker", "CPUWorker", "WorkerBase")):
        bases = {ast.unparse(base).removesuffix("V0") for base in worker.bases}
        assert bases <= {*classes, "ABC"}, f"{worker.name} has names from elsewhere too"
    taken = {name for path in paths for node in ast.walk(release.tree(path)) for name in bound_in_class(node)}
    assert {"load_model", "execute_model"} <= taken
    ours = {name for node in ast.walk(extension_class()) for name in bound_in_class(node)}
    assert ours and not ours & taken
    assert all(name.lstrip("_").startswith("tandem_") for name in ours if not name.startswith("__"))


def bound_in_class(node: ast.AST) -> Iterator[str]:
    """Names a class gives its instances: methods, values in its body, and what methods assign to self."""
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield part.name
            elif isinstance(part, ast.Assign):
                yield from (target.id for target in part.targets if isinstance(target, ast.Name))
            elif isinstance(part, ast.AnnAssign) and part.value is not None:
                yield ast.unparse(part.target)
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        yield node.attr


def test_names_we_import_exist(release: Release) -> None:
    missing = [
        f"{path.name}: from vllm.{module} import {name}"
        for path in SEAM.glob("*.py")
        if path.name != "worker.py" or release.version.release < (0, 8)
        for module, name in imports(path)
        if not release.defines(module, name)
    ]
    assert not missing


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module below vllm, name) of everything a file of ours takes from vLLM."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
            yield from ((node.module.partition(".")[2], alias.name) for alias in node.names)


def test_patches_change_what_needs_them_and_nothing_else(release: Release, can: Capabilities) -> None:
    changed = set()
    for patch in patches.PATCHES:
        code = release.code(patch.function, patch.module.replace(".", "/") + ".py")
        if code and patch.rewritten(code)[1]:
            changed.add(patch.name)
    assert changed == ({patch.name for patch in patches.PATCHES} if can.needs_patches else set())


def test_cpu_packing_can_be_replaced(release: Release, can: Capabilities) -> None:
    """The function is looked up in its module at every call, so it is enough to replace it there."""
    if not can.cpu_gemm_dispatch:
        return
    line = "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm"
    for path, cls in PACKERS.items():
        code = release.code(f"{cls}.process_weights_after_loading", path)
        assert comes_before(code, line, "dispatch_cpu_unquantized_gemm(layer, remove_weight="), path
    for path in release.files("model_executor/layers/*.py"):
        copies = [n for n in release.tree(path).body if isinstance(n, ast.ImportFrom) and line in ast.unparse(n)]
        assert not copies, path
    assert "layer.cpu_linear(x, weight, bias)" in release.text(UTILS)


def test_experts_have_the_loader_we_restore(release: Release) -> None:
    (lost,) = [fact for fact in FACTS if fact.name == "expert weights are made anew"]
    if lost.holds(release.version):
        assert release.function("FusedMoE.weight_loader", "model_executor/layers/fused_moe/layer.py")

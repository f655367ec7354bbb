"""What the engine tests share: tiny models, a ragged table of sequences, and training worlds of one to four ranks.

A world runs a function `f(mesh, *args)` on every rank and returns what each rank answered. The world of one rank is
this process; those of two and four ranks are processes over gloo, started once for all tests.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from trainer.algorithms.aggregation import count_loss_tokens, normalizers
from trainer.algorithms.losses import PolicyLoss
from trainer.algorithms.policy.clipped import Ppo
from workers.batch import Batch
from workers.engines.base import EngineSpec, Loss, OptimizerSpec, ShardSpec, StepResult, TrainEngine, Update
from workers.engines.fsdp import FSDPEngine
from workers.normalizers import Normalizers

VOCABULARY = 37
LENGTH = 8.0
ANSWER_SECONDS = 120
CPU = torch.device("cpu")
FloatArray = npt.NDArray[np.float32]
Rows = Sequence[Sequence[int]]
"""Rows of each micro-batch."""
Shard = tuple[str, FloatArray, tuple[int, ...], int, int]
"""HF name, one rank's part, full shape, first index, dimension it is cut along."""

NO_WRAP, WRAP = 10**9, 0
"""EngineSpec's wrap_min_num_params: layers gathered with the rest, or each by itself."""

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "deep": LlamaConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
    "mixed": Qwen3MoeConfig,
}
_FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MORE: dict[str, dict[str, Any]] = {
    "deep": {"num_hidden_layers": 4},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": _FOUR_EXPERTS | {"norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixed": _FOUR_EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [1], "num_hidden_layers": 4},
}
"""What else their configs say."""

GRADIENT_SCALE = 1e6
OBSERVED = OptimizerSpec(
    lr=GRADIENT_SCALE * 1e8,
    weight_decay=0.0,
    betas=(0.9, 0.95),
    eps=1e8,
    clip_grad=1e9,
    lr_scheduler_type="constant",
    warmup_steps=0,
    min_lr_ratio=0.0,
    total_steps=10,
)
"""AdamW whose first step adds -GRADIENT_SCALE times the gradient: with eps far above it, g / (|g| + eps) is g / eps."""

ADAMW = replace(OBSERVED, lr=1e-3, weight_decay=0.1, eps=1e-6, clip_grad=0.5)
"""AdamW as people use it; eps is above the rounding noise of gradients that are zero in exact arithmetic."""

LOSS = PolicyLoss(
    objective=Ppo(clip_low=0.2, clip_high=0.28, clip_c=3.0),
    agg_mode="seq-mean-token-mean",
    entropy_coeff=0.01,
    calculate_entropy=False,
    kl_loss_coef=0.1,
    kl_loss_type="k3",
    length=LENGTH,
)


def make_model(directory: Path, kind: str, *, tied: bool, seed: int = 0) -> Path:
    """Writes a tiny checkpoint in which norms and biases are random too."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }
    config = CONFIGS[kind](**sizes | MORE.get(kind, {}), tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(directory)
    return directory


def make_spec(path: Path, **changes: Any) -> EngineSpec:
    """An engine in float32 whose step shows its gradient; `changes` are fields of EngineSpec or ShardSpec."""
    shard_names = ("dtype", "master_dtype", "reshard_after_forward", "wrap_min_num_params")
    sharding = {n: changes.pop(n) for n in shard_names if n in changes}
    spec = EngineSpec(
        model_path=str(path),
        head="logprobs",
        sharding=ShardSpec("float32", "float32", True, NO_WRAP),
        optimizer=OBSERVED,
        gradient_checkpointing=False,
        share_prompt=True,
    )
    return replace(spec, sharding=replace(spec.sharding, **sharding), **changes)


@dataclass(frozen=True, slots=True)
class Table:
    """All sequences of a batch and their per-token columns."""

    prompts: list[npt.NDArray[np.int32]]
    responses: list[npt.NDArray[np.int32]]
    group: npt.NDArray[np.int32]
    columns: dict[str, list[npt.NDArray[Any]]]

    def __len__(self) -> int:
        return len(self.responses)

    @staticmethod
    def random(seed: int = 0) -> Table:
        """Twelve ragged sequences of five prompts, one of them empty, with every column the losses read."""
        rng = np.random.default_rng(seed)
        lengths = [3, 5, 1, 0, 2, 2, 7, 4, 1, 6, 3, 3]
        group = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4], dtype=np.int32)
        prompts = [rng.integers(0, VOCABULARY, size).astype(np.int32) for size in (4, 1, 6, 3, 2)]
        names = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "returns")
        columns = {name: [rng.normal(0, 1, n).astype(np.float32) for n in lengths] for name in names}
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
            columns[name] = [(c * 0.15 - 3.6).astype(np.float32) for c in columns[name]]
        columns["rollout_logprobs"][1][:] = np.nan
        masks = [rng.random(n) < 0.8 for n in lengths]
        responses = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]
        return Table([prompts[g] for g in group], responses, group, columns | {"loss_mask": masks})

    def with_column(self, name: str, value: float, rows: Sequence[int] | None = None) -> Table:
        """The same with one column filled with a value, in these rows (all)."""
        chosen = range(len(self)) if rows is None else rows
        column = [np.full_like(c, value) if i in chosen else c for i, c in enumerate(self.columns[name])]
        return replace(self, columns=self.columns | {name: column})

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows in this order, as one rank holds them."""
        flat = {n: np.concatenate([np.zeros(0, c[0].dtype), *(c[r] for r in rows)]) for n, c in self.columns.items()}
        tokens = {name: torch.from_numpy(values) for name, values in flat.items()}
        responses = [self.responses[r] for r in rows]
        size = sum(len(r) for r in responses)
        return Batch([self.prompts[r] for r in rows], responses, self.group[list(rows)], TensorDict(tokens, [size]))

    def norm(self) -> Normalizers:
        """Counts of the loss over all sequences."""
        lengths = np.array([len(r) for r in self.responses], dtype=np.int64)
        return normalizers(count_loss_tokens(lengths, np.concatenate(self.columns["loss_mask"])), length=LENGTH)


@dataclass(frozen=True, slots=True)
class Job:
    """One or more optimizer steps on the same table. split: micro-batches of each data-parallel rank, as rows of it."""

    spec: EngineSpec
    table: Table
    split: tuple[Rows, ...]
    loss: Loss = LOSS
    steps: int = 1
    temperature: float = 0.8
    load: Path | None = None
    save: Path | None = None
    save_hf: Path | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What one rank saw: results of the steps, log-probs per row before the first, the weights after the last."""

    results: list[StepResult]
    outputs: dict[int, FloatArray]
    shards: list[Shard]
    dtypes: set[torch.dtype]


def build(mesh: DeviceMesh, spec: EngineSpec) -> TrainEngine:
    """The engine that the spec names."""
    if spec.strategy == "fsdp":
        return FSDPEngine(spec, mesh, CPU)
    from workers.engines.megatron.engine import MegatronEngine

    return MegatronEngine(spec, CPU)


def data_rank(mesh: DeviceMesh, spec: EngineSpec) -> int:
    """Whose micro-batches this rank works on."""
    return spec.parallel.data_rank(mesh.get_rank(), mesh.size())


def train(mesh: DeviceMesh, job: Job) -> Answer:
    """A job on one rank: build, load, forward, steps, save."""
    engine = build(mesh, job.spec)
    if job.load is not None:
        engine.load(job.load)
    split = job.split[data_rank(mesh, job.spec)]
    rows = [row for micro in split for row in micro]
    batch, place = job.table.batch(rows), {row: i for i, row in enumerate(rows)}
    local = [[place[row] for row in micro] for micro in split]
    flat = engine.forward(batch, local, temperature=job.temperature).numpy()
    outputs = {row: flat[batch.token_index([i])] for row, i in place.items() if engine.holds_outputs}
    update = Update(local, job.table.norm())
    steps = range(job.steps)
    results = [engine.train_step(batch, update, job.loss, temperature=job.temperature, entropy=True) for _ in steps]
    if job.save is not None:
        engine.save(job.save)
    if job.save_hf is not None:
        engine.save_hf(job.save_hf)
    return Answer(results, outputs, export(engine), {data.dtype for _, data, *_ in engine.export_weights()})


def export(engine: TrainEngine) -> list[Shard]:
    """This rank's part of every parameter, copied."""
    return [(name, data.detach().float().clone().numpy(), *where) for name, data, *where in engine.export_weights()]


def assemble(shards: Sequence[list[Shard]]) -> dict[str, FloatArray]:
    """Whole parameters from all ranks' parts, each element written exactly once."""
    weights: dict[str, FloatArray] = {}
    written: dict[str, npt.NDArray[np.int64]] = {}
    orders = [[(name, shape, dim) for name, _, shape, _, dim in rank] for rank in shards]
    assert all(order == orders[0] for order in orders), "the same parameters in the same order on every rank"
    assert len({name for name, *_ in orders[0]}) == len(orders[0]), "a rank exports a parameter once"
    for name, data, shape, first, dim in (shard for rank in shards for shard in rank):
        target = weights.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
        counts = written.setdefault(name, np.zeros(shape, dtype=np.int64))
        own = (slice(None),) * dim + (slice(first, first + data.shape[dim]),)
        target[own] = data
        counts[own] += 1
    assert all((counts == 1).all() for counts in written.values()), "every element exactly once"
    return weights


def one_by_one(weights: dict[str, FloatArray], kind: str) -> dict[str, FloatArray]:
    """With experts as they are in files: transformers has those of a layer in one parameter, gate and up together."""
    where = ".block_sparse_moe." if kind == "mixtral" else ".mlp."
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, FloatArray] = {}
    for name, value in weights.items():
        before, _, what = name.replace(".mlp.", where).rpartition(".")
        names = {"gate_up_proj": (gate, up), "down_proj": (down,)}.get(what)
        if names is None:
            found[f"{before}.{what}"] = value
            continue
        for number, expert in enumerate(value):
            halves = zip(names, np.split(expert, len(names)), strict=True)
            found |= {f"{before}.{number}.{which}.weight": part for which, part in halves}
    return found


def relative_error(got: dict[str, FloatArray], expected: dict[str, FloatArray]) -> float:
    """Distance of all parameters together from what is expected, relative to the latter's norm."""
    return _norm(_difference(got, expected).values()) / _norm(expected.values())


def worst_error(got: dict[str, FloatArray], expected: dict[str, FloatArray]) -> float:
    """The largest distance of one parameter from what is expected, relative to the latter's norm."""
    return max(_norm([d]) / (_norm([expected[name]]) or 1.0) for name, d in _difference(got, expected).items())


def _difference(got: dict[str, FloatArray], expected: dict[str, FloatArray]) -> dict[str, FloatArray]:
    assert got.keys() == expected.keys()
    return {name: got[name] - value for name, value in expected.items()}


def _norm(values: Iterable[FloatArray]) -> float:
    return math.sqrt(sum(float(np.sum(v.astype(np.float64) ** 2)) for v in values))


class Solo:
    """The world of one rank: this process."""

    size = 1

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a second one would spin against the other world's processes
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._mesh = init_device_mesh("cpu", (1,))

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(mesh, *args)`, as a list of one."""
        return [function(self._mesh, *args)]

    def close(self) -> None:
        """Leaves the process group, and those that Megatron made of it."""
        if groups := sys.modules.get("workers.engines.megatron.groups"):
            groups._MADE.clear()
            vars(groups.parallel_state).update(groups._NOTHING)
        dist.destroy_process_group()
        torch.set_num_threads(self._threads)


class Pair:
    """The world of two ranks: two processes, which take one function after the other."""

    size = 2

    def __init__(self, directory: Path) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(self.size)]
        self._ends = [ours for ours, _ in pipes]
        store = str(directory / "store")
        ranks = [(rank, self.size, store, theirs) for rank, (_, theirs) in enumerate(pipes)]
        self._processes = [context.Process(target=_serve, args=rank, daemon=True) for rank in ranks]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(mesh, *args)` on all ranks; raises what a rank raised, with its traceback."""
        for end in self._ends:
            end.send((function, args))
        answers = [end.recv() if end.poll(ANSWER_SECONDS) else ("no answer", None) for end in self._ends]
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if errors:
            raise AssertionError("\n".join(errors))
        return [answer for _, answer in answers]

    def close(self) -> None:
        """Ends the processes, which hold nothing that needs an orderly end."""
        for process in self._processes:
            process.kill()
            process.join()


class Quad(Pair):
    """The world of four ranks."""

    size = 4


def _serve(rank: int, size: int, store: str, end: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=ANSWER_SECONDS // 2)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
    mesh = init_device_mesh("cpu", (size,))
    while True:
        function, args = end.recv()
        try:
            answer = ("", function(mesh, *args))
        except Exception:
            answer = (traceback.format_exc(), None)
        end.send(answer)

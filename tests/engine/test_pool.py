"""Replicas that die, hang, fail or wait, seen by the pool: real Ray actors that keep to a replica's protocol.

What each one does is a script: (number of chunks that come before, what happens then).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from trainer.memory import TrainingMemory
from trainer.samples import check_complete
from trainer.sources import SyncSource
from trainer.tracking.jsonl import read_jsonl
from trainer.tracking.phases import Phases
from trainer.tracking.rollout import ROLLOUT_FILE, RolloutLog
from workers.group import WorkerError, WorkerGroup
from workers.memory import MemoryReport
from workers.protocol import Prompt, RolloutBlock, ScoreRequest, Scores, SequenceMeta, Trajectory, split
from workers.rollout.calls import Chunk
from workers.rollout.pool import PoolLimits, RolloutPool
from workers.rollout.spec import GenerateRequest, GenerateStats, ReplicaStatus, SamplingSpec
from workers.rollout.vllm.replica import CONCURRENCY_GROUPS
from workers.rollout.watch import Reading

N = 2
SAMPLING = SamplingSpec(
    n=N, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=8, ignore_eos=False, stop_token_ids=(), logprobs="none"
)
SHARE = 0.4
Script = dict[int, str]


class FakeReplica:
    """Answers each prompt with its own tokens, one chunk per prompt."""

    def __init__(self, rank: int, script: Script, step_s: float, copies: int) -> None:
        self._rank = rank
        self._script = script
        self._step_s = step_s
        self._copies = copies
        self._busy = False
        self._steps = self._tokens = 0
        self._version = -1
        self._asleep: list[str] = []
        self._calls: list[str] = []

    def ping(self) -> int:
        """Up."""
        self._do("start")
        return self._rank

    def generate(self, request: GenerateRequest) -> Iterator[object]:
        """The protocol of VllmReplica.generate."""
        assert not self._asleep
        self._busy = True
        prompts = split(request.token_ids, request.lengths)
        for number, (group, prompt) in enumerate(zip(request.groups.tolist(), prompts, strict=True)):
            self._do(number)
            time.sleep(self._step_s)
            block = RolloutBlock.collate([self._respond(group, sample, tuple(prompt.tolist())) for sample in range(N)])
            self._steps += 1
            self._tokens += len(block.response_ids)
            yield block
            yield block.meta
        self._do(len(prompts))
        self._busy = False
        yield GenerateStats(0.1, self._tokens, 1000 + self._rank, 5000 + self._rank)

    def _respond(self, group: int, sample: int, prompt: tuple[int, ...]) -> Trajectory:
        return Trajectory(group, sample, prompt, prompt * self._copies, "stop", self._version)

    def _do(self, when: int | str) -> None:
        what = self._script.get(when, "")  # type: ignore[call-overload]
        if what == "die":
            time.sleep(0.1)  # what was yielded before arrives, as it does when an engine dies later
            os._exit(1)
        if what == "stop":
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "raise":
            raise ArithmeticError("no such token")
        if what == "freeze":
            time.sleep(60)
        if what == "pause":
            self._busy = False
            time.sleep(3.5)
            self._busy = True

    def finish_update(self, version: int) -> int:
        """New weights."""
        self._do(f"update {version}")
        self._calls.append(f"update {version} without {' '.join(self._asleep)}".removesuffix(" without "))
        self._version = version
        return version

    def sleep(self, keep_weights: bool = False) -> dict[str, int]:
        """Gives memory back, once."""
        self._do("sleep")
        assert not self._asleep
        self._calls.append("sleep")
        self._asleep = ["weights", "kv_cache"]
        return {"weights": 300 + self._rank, "kv_cache": 7000 - self._rank}

    def wake(self, tag: str) -> int:
        """Nothing for one that has it."""
        self._do(tag)
        if tag in self._asleep:
            self._calls.append(f"wake {tag}")
            self._asleep.remove(tag)
        return 100 * (3 - len(self._asleep)) + self._rank

    def calls(self) -> list[str]:
        """What became of its memory and its weights."""
        return self._calls

    @ray.method(concurrency_group="control")
    def status(self) -> ReplicaStatus:
        """As it is."""
        return ReplicaStatus(os.getpid(), self._busy, self._steps, int(self._busy), 0, 0.5, 0, self._tokens)


class FakeRank:
    """What TrainingMemory asks of a TrainWorker."""

    def __init__(self, offloaded: dict[str, int], lacking: int) -> None:
        self._offloaded = offloaded
        self._lacking = lacking
        self._asked: list[tuple[int, float]] = []

    def make_room(self, num_bytes: int, share: float) -> None:
        """Notes it."""
        self._asked.append((num_bytes, share))

    def asked(self) -> list[tuple[int, float]]:
        """What room was wanted."""
        return self._asked

    def memory_report(self, take: bool) -> MemoryReport:
        """The same each time."""
        return MemoryReport({"update": 9000, "publish": 150, "save": 1}, self._offloaded, 10_000, self._lacking)


class FakeScorer:
    """Rewards are the ground truth; notes when each chunk came."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def score(self, block: RolloutBlock, request: ScoreRequest) -> Scores:
        """The protocol of RewardWorker.score."""
        self._times.append(time.time())
        rewards = np.array([request.ground_truth[row] for row in block.prompt_of], dtype=np.float32)
        return Scores(rewards, {}, ("",) * len(rewards))

    def times(self) -> list[float]:
        """Of all calls."""
        return self._times


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """A small local Ray."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


class Bench:
    """A pool of fakes. scripts: of each rank, one for each life; a life without one goes well.

    hang_s: after which one hangs; far above what a busy machine needs, where hanging is not the matter.
    """

    def __init__(
        self, *scripts: list[Script], step_s: float = 0.05, copies: int = 1, most: int = 3, hang_s: float = 15
    ) -> None:
        self.scripts = {rank: list(lives) for rank, lives in enumerate(scripts)}
        self.started: list[int] = []
        self.actors: list[ray.actor.ActorHandle] = []
        self.readings: list[Reading] = []
        self._step_s, self._copies = step_s, copies
        limits = PoolLimits(
            timeout_s=40,
            update_timeout_s=40,
            startup_timeout_s=40,
            hang_timeout_s=hang_s,
            max_replacements=most,
            memory_share=SHARE,
        )
        self.pool = RolloutPool(self._start, len(scripts), limits=limits, observe=self.readings.append)
        self.pool.ready()
        self.update(1)

    def _start(self, rank: int) -> ray.actor.ActorHandle:
        lives = self.scripts[rank]
        self.started.append(rank)
        new = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(FakeReplica)
        step_s = self._step_s if rank == 0 else 2 * self._step_s
        self.actors.append(new.remote(rank, lives.pop(0) if lives else {}, step_s, self._copies))
        return self.actors[-1]

    def update(self, version: int) -> list[int]:
        """Weights of this version for all."""
        return self.pool.update(lambda group: group.broadcast(FakeReplica.finish_update, version).result(30))

    def generate(self, per_replica: int = 3) -> list[Chunk]:
        """Chunks of one call."""
        return list(self.pool.generate(self.requests(per_replica)))

    def requests(self, per_replica: int = 3) -> list[GenerateRequest]:
        """As many prompts for each."""
        ranges = [np.arange(r * per_replica, (r + 1) * per_replica, dtype=np.int32) for r in range(len(self.pool))]
        return [GenerateRequest(np.repeat(g, 2), np.full(len(g), 2, dtype=np.int32), g, SAMPLING, 7) for g in ranges]

    def close(self) -> None:
        """Ends the actors."""
        for actor in self.actors:
            ray.kill(actor)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """Makes benches, and ends their actors."""
    made: list[Bench] = []

    def make(*scripts: list[Script], **options: float) -> Bench:
        made.append(Bench(*scripts, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def groups(chunks: list[Chunk]) -> list[int]:
    return sorted(int(g) for chunk in chunks for g in np.unique(chunk.meta.group))


def assert_complete(chunks: list[Chunk], num_prompts: int, version: int = 1) -> None:
    """Each prompt once, all its tokens there, all with these weights."""
    check_complete([c.meta for c in chunks], num_prompts=num_prompts, n=N)
    for chunk in chunks:
        block: RolloutBlock = ray.get(chunk.block, timeout=5)
        assert set(block.meta.weight_version.tolist()) == {version}
        for response, prompt in zip(block.responses(), block.prompts(), strict=True):
            assert set(response.tolist()) == set(prompt.tolist()) == set(block.meta.group.tolist())


def told_by_the_pool(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == "workers.rollout.pool"]


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in told_by_the_pool(caplog)]


def noticed_within(caplog: pytest.LogCaptureFixture, begun: float, seconds: float) -> bool:
    """The first notice came that soon after `begun`; what a new process takes to start does not count."""
    return told_by_the_pool(caplog)[0].created - begun < seconds


def test_chunks_come_as_they_finish_and_each_prompt_once(bench: Callable[..., Bench]) -> None:
    one = bench([], [])
    chunks = one.generate()
    assert_complete(chunks, 6)
    assert [c.replica for c in chunks][:2] in ([0, 0], [0, 1]), "the fast one first"
    assert [c.replica for c in chunks][-1] == 1
    assert one.started == [0, 1]
    assert {r.replica for r in one.readings} == {0, 1}
    assert sum(r.tokens for r in one.readings) == 6 * N * 2
    assert one.pool.peak_bytes == 1001
    assert_complete(one.generate(5), 10)
    assert sum(r.tokens for r in one.readings) == 16 * N * 2, "counters go on"


def test_a_replica_without_prompts_is_left_alone(bench: Callable[..., Bench]) -> None:
    one = bench([], [{0: "raise"}])
    request = one.requests()[0]
    empty = GenerateRequest(request.token_ids[:0], request.lengths[:0], request.groups[:0], SAMPLING, 7)
    assert_complete(list(one.pool.generate([request, empty])), 3)


def test_scoring_starts_while_others_generate(bench: Callable[..., Bench], tmp_path: Path) -> None:
    one = bench([], [], step_s=0.3)
    scorer = ray.remote(num_cpus=0)(FakeScorer).remote()
    assert ray.get(scorer.times.remote()) == []
    log = RolloutLog(tmp_path)
    one.pool.observe = log.observe
    memory = TrainingMemory([], [], timeout_s=30)
    scorers = WorkerGroup("reward", [scorer])
    source = SyncSource(one.pool, scorers, Phases(), log=log, memory=memory, timeout_s=30, seed=1)
    prompts = [Prompt(index=i, token_ids=(i, i), ground_truth=10.0 + i) for i in range(6)]
    begun = time.time()
    samples = source.generate("k", prompts, SAMPLING, seed=(1,), sleep=True)
    ended = time.time()
    assert samples.rewards.tolist() == [10.0 + i for i in range(6) for _ in range(N)]
    assert samples.meta.group.tolist() == [i for i in range(6) for _ in range(N)]
    times = ray.get(scorer.times.remote())
    assert len(times) == 6
    assert ended - times[0] > 0.7 * (ended - begun), "the first at once"
    metrics = source.take_metrics()
    assert metrics["rollout/running_max"] == 1
    assert metrics["rollout/cache_use_max"] == 0.5
    assert metrics["rollout/replaced"] == 0
    assert 0.3 * 24 / 1.8 < metrics["rollout/tokens_per_second"] < 1.2 * 24 / 1.8
    lines = list(read_jsonl(tmp_path / ROLLOUT_FILE))
    assert {line["replica"] for line in lines} == {0, 1}
    assert sum(line["replica"] == 1 for line in lines) >= 2, "one each second, one at the end"
    ray.kill(scorer)


def test_training_makes_room_for_what_replicas_take_again(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """The most that one of them gave back; around a checkpoint only if something of training is offloaded, or will
    have to be."""
    ranks = [ray.remote(num_cpus=0)(FakeRank).remote(*a) for a in (({}, 0), ({"ref_weights": 40}, 0), ({}, 7))]
    beside, elsewhere, unmade = (WorkerGroup("training", [rank]) for rank in ranks)
    one, log = bench([], []), RolloutLog(tmp_path)
    for groups, crowded in (([beside], False), ([beside, unmade], True), ([beside, elsewhere], True)):
        memory = TrainingMemory(groups, [[beside], []], timeout_s=30)
        source = SyncSource(one.pool, WorkerGroup("reward", []), Phases(), log=log, memory=memory, timeout_s=30, seed=1)
        assert memory.is_crowded() == crowded
        source.sleep()
        source.sleep()  # nothing more to give
        source.wake_weights()
        source.wake_cache()
        with source.aside():
            pass
    assert ray.get(ranks[0].asked.remote()) == [(301, 0.0), (7000, 0.0)] * 5
    assert ray.get(ranks[1].asked.remote()) == []
    memory = TrainingMemory([], [[beside], [elsewhere]], timeout_s=30)
    memory.make_room(5, 0.5, 1)
    assert ray.get(ranks[1].asked.remote()) == [(5, 0.5)], "beside that replica only"
    one.generate()
    metrics = {name: value for name, value in source.take_metrics().items() if name.startswith("memory/")}
    assert metrics == {
        "memory/generate_peak_bytes": 5001.0,
        "memory/update_peak_bytes": 9000.0,
        "memory/sync_peak_bytes": 301.0,
        "memory/offloaded_bytes/ref_weights": 40.0,
        "memory/device_bytes": 10_000.0,
        "memory/rollout_peak_bytes": 1001.0,
    }
    for rank in ranks:
        ray.kill(rank)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_what_a_dead_replica_had_not_given_is_generated_again(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, after: int
) -> None:
    """Chunks of 400 KB, which lie in shared memory: they outlive who made them."""
    one = bench([], [{after: "die"}], copies=25_000)
    chunks = one.generate()
    assert_complete(chunks, 6)
    assert one.started == [0, 1, 1]
    assert one.pool.take_replaced() == 1
    died, back = notices(caplog)
    assert "rollout replica 1 (pid " in died
    assert "generate: the worker process died" in died
    assert "1 of at most 3 in this step" in died
    assert back.startswith("note: rollout replica 1 (pid ")
    assert_complete(one.generate(), 6)


def test_what_came_before_a_death_counts_and_only_the_rest_is_asked_for_again(bench: Callable[..., Bench]) -> None:
    """Killed from outside, right after the driver took a chunk."""
    one = bench([], [], copies=25_000, step_s=0.3)
    chunks = []
    for chunk in one.pool.generate(one.requests()):
        chunks.append(chunk)
        if chunk.replica == 1 and len(one.started) == 2:
            first = ray.get(one.actors[1].status.remote())
            os.kill(first.pid, signal.SIGKILL)
    assert_complete(chunks, 6)
    assert one.started == [0, 1, 1]
    assert ray.get(one.actors[2].status.remote()).tokens == 2 * N * 50_000, "two prompts, not three"


def test_a_death_after_the_last_chunk_repeats_nothing(bench: Callable[..., Bench]) -> None:
    one = bench([], [{3: "die"}])
    assert_complete(one.generate(), 6)
    assert one.started == [0, 1, 1]
    assert ray.get(one.actors[2].status.remote()).tokens == 0


@pytest.mark.parametrize("how", ["stop", "freeze"])
def test_a_replica_that_hangs_is_killed_and_replaced(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Stopped: nothing of it answers. Frozen: it answers, but makes no step."""
    one = bench([], [{1: how}], hang_s=2)
    pid = ray.get(one.actors[1].status.remote()).pid
    begun = time.time()
    assert_complete(one.generate(), 6)
    assert noticed_within(caplog, begun, 8)
    assert one.started == [0, 1, 1]
    told = notices(caplog)[0]
    assert f"rollout replica 1 (pid {pid}), generate: hangs" in told
    assert {"stop": "no answer for", "freeze": "no engine step for"}[how] in told
    assert not Path(f"/proc/{pid}").exists()


def test_a_paused_replica_does_not_hang(bench: Callable[..., Bench]) -> None:
    one = bench([], [{1: "pause"}], hang_s=2)
    assert_complete(one.generate(), 6)
    assert one.started == [0, 1]
    assert sum(r.replica == 1 for r in one.readings) >= 3, "one each second"


def test_before_its_first_token_a_replica_may_take_its_time(bench: Callable[..., Bench]) -> None:
    one = bench([], [], step_s=1.8, hang_s=2)
    assert_complete(one.generate(1), 2)
    assert one.started == [0, 1]


def test_both_replicas_may_die(bench: Callable[..., Bench]) -> None:
    one = bench([{1: "die"}], [{2: "die"}])
    assert_complete(one.generate(), 6)
    assert sorted(one.started) == [0, 0, 1, 1]
    assert one.pool.take_replaced() == 2
    assert one.pool.take_replaced() == 0


def test_an_exception_is_no_death(bench: Callable[..., Bench]) -> None:
    one = bench([], [{1: "raise"}])
    with pytest.raises(WorkerError, match=r"(?s)rollout rank 1, generate: .*ArithmeticError.*no such token"):
        one.generate()
    assert one.started == [0, 1]


def test_replacements_are_limited(bench: Callable[..., Bench]) -> None:
    one = bench([], [{1: "die"}, {0: "die"}, {0: "die"}], most=2)
    with pytest.raises(WorkerError, match=r"rollout replica 1 .*died.*max_replacements=2 a step"):
        one.generate()
    assert one.started == [0, 1, 1, 1]


def test_a_replacement_that_does_not_start_is_replaced(bench: Callable[..., Bench]) -> None:
    one = bench([], [{1: "die"}, {"start": "die"}])
    assert_complete(one.generate(), 6)
    assert one.started == [0, 1, 1, 1]


def test_what_fails_at_the_start_is_not_tried_again(bench: Callable[..., Bench]) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rollout rank 1, ping: .*no such token"):
        bench([], [{"start": "raise"}])


def test_a_death_during_an_update_gives_all_the_weights_again(bench: Callable[..., Bench]) -> None:
    one = bench([], [{"update 2": "die"}])
    assert one.update(2) == [2, 2]
    assert one.started == [0, 1, 1]
    assert_complete(one.generate(), 6, version=2)


def test_a_stopped_replica_is_noticed_during_an_update(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    one = bench([], [], hang_s=2)
    one.generate()
    os.kill(ray.get(one.actors[1].status.remote()).pid, signal.SIGSTOP)
    begun = time.time()
    assert one.update(2) == [2, 2]
    assert noticed_within(caplog, begun, 8)
    assert one.started == [0, 1, 1]


@pytest.mark.parametrize("when", ["sleep", "weights", "kv_cache"])
def test_a_death_between_generation_and_update(bench: Callable[..., Bench], when: str) -> None:
    """The new one is brought to where the others are; it has the weights before it generates."""
    one = bench([], [{when: "die"}])
    one.generate()
    room: list[tuple[int, float, int, int]] = []
    one.pool.make_room = lambda num_bytes, share, rank: room.append((num_bytes, share, rank, len(one.started)))
    one.pool.sleep()
    one.pool.wake("weights")
    one.update(2)
    one.pool.wake("kv_cache")
    assert one.started == [0, 1, 1]
    given_back = 0 if when == "sleep" else 7301
    assert room == [(given_back, SHARE, 1, 2)], "before the new one starts, two have been"
    calls = ray.get(one.actors[2].calls.remote())
    woken = ["sleep", "wake weights", "update 2 without kv_cache", "wake kv_cache"]
    assert calls == (woken if when != "kv_cache" else ["sleep", "wake weights", "wake kv_cache"])
    assert_complete(one.generate(), 6, version=2)


def test_a_new_replica_gets_its_weights_without_a_cache(bench: Callable[..., Bench]) -> None:
    """Training may need the room of the cache to send them; it makes it again before the cache wakes."""
    one = bench([], [{1: "die"}])
    happened: list[object] = []
    one.pool.make_room = lambda *asked: happened.append(asked)

    def publish(group: WorkerGroup) -> list[int]:
        happened.append("publish")
        return group.broadcast(FakeReplica.finish_update, 2).result(30)

    one.pool.update(publish)
    one.generate()
    assert happened == ["publish", (0, SHARE, 1), "publish", (6999, 0.0, 1)]
    expected = ["sleep", "wake weights", "update 2 without kv_cache", "wake kv_cache"]
    assert ray.get(one.actors[2].calls.remote()) == expected


def test_a_replica_lost_in_an_update_wakes_its_cache_with_the_others(bench: Callable[..., Bench]) -> None:
    one = bench([], [{"update 2": "die"}])
    one.pool.sleep()
    one.pool.wake("weights")
    assert one.update(2) == [2, 2]
    expected = ["sleep", "wake weights", "update 2 without kv_cache"]
    assert ray.get(one.actors[2].calls.remote()) == expected
    one.pool.wake("kv_cache")
    assert_complete(one.generate(), 6, version=2)


def test_a_failed_checkpoint_leaves_the_replicas_awake(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """And what they took again is no part of a sync."""
    rank = ray.remote(num_cpus=0)(FakeRank).remote({"ref_weights": 40}, 0)
    one, log, beside = bench([], []), RolloutLog(tmp_path), WorkerGroup("training", [rank])
    memory = TrainingMemory([beside], [[beside], [beside]], timeout_s=30)
    source = SyncSource(one.pool, WorkerGroup("reward", []), Phases(), log=log, memory=memory, timeout_s=30, seed=1)
    with pytest.raises(OSError, match="disk full"), source.aside():
        raise OSError("disk full")
    assert_complete(one.generate(), 6)
    assert source.take_metrics()["memory/sync_peak_bytes"] == 150, "what a rank says"
    ray.kill(rank)


def test_a_closed_pool_has_no_process_left(bench: Callable[..., Bench]) -> None:
    some = bench([], [])
    pids = [ray.get(actor.status.remote()).pid for actor in some.actors]
    some.pool.close()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):  # gone, at whatever moment
            assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_metadata_of_a_chunk_matches_its_block(bench: Callable[..., Bench]) -> None:
    one = bench([])
    for chunk in one.generate():
        meta: SequenceMeta = ray.get(chunk.block).meta
        np.testing.assert_array_equal(meta.group, chunk.meta.group)

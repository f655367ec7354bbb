"""Which rows are trained when, where and together: a pure function of lengths, on the driver, in numpy.

    mini-batch   the rows of one optimizer step: so many prompts with all their responses, whatever the number of ranks
    rank         each row stays on one data-parallel rank for the whole batch, so what is computed there stays there
    micro-batch  the rows of one forward pass on one rank: never more tokens than the budget

Ranks are balanced by FLOPs, not by tokens, because attention is quadratic. Within a mini-batch every rank runs the same
number of micro-batches (some may be empty), because collectives have to match.

Responses to one prompt (a group) stay together where possible, because a micro-batch computes a shared prompt once. A
group is split over ranks where it would put one of them more than 5 % above the mean, and over micro-batches where it
does not fit into one.

Everything is sorted by size with the order of the rows as a tie-break: the same lengths give the same plan.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
MicroBatchRows = tuple[int, ...]
RankPlan = tuple[MicroBatchRows, ...]

BALANCE_TOLERANCE = 0.05
"""A group stays whole on a rank as long as that rank is at most this far above the mean."""

SPREAD_TRIES = 4
"""Micro-batches tried for one chunk when evening out FLOPs, before the tight packing is kept."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one micro-batch may hold.

    max_tokens: hard budget. max_sequences: at most so many responses; None: any number.
    share_prompt: a prompt counts once per micro-batch, not once per response.
    key: the configuration key of the budget, for the error message.
    """

    max_tokens: int
    max_sequences: int | None = None
    share_prompt: bool = True
    key: str = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """One pass over some rows. ranks[r][k]: rows of the k-th micro-batch of rank r, those of a group side by side."""

    ranks: tuple[RankPlan, ...]

    @property
    def num_micro_batches(self) -> int:
        """On every rank."""
        return len(self.ranks[0])

    @property
    def rows(self) -> IntArray:
        """All its rows, ascending."""
        return np.sort(np.fromiter((r for rank in self.ranks for rows in rank for r in rows), dtype=np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """Every optimizer step of one batch.

    minibatches: in order of time, all those of the first epoch, then the second ...
    rank_of: [S], the rank on which each row is trained, in all epochs.
    """

    minibatches: tuple[MiniBatch, ...]
    rank_of: IntArray

    def rows_of_rank(self, rank: int) -> IntArray:
        """Rows that live on this rank, ascending."""
        return np.flatnonzero(self.rank_of == rank)


def plan_batch(
    prompt_length: npt.NDArray[np.integer],
    response_length: npt.NDArray[np.integer],
    group: npt.NDArray[np.integer],
    *,
    groups_per_minibatch: int,
    num_ranks: int,
    limits: Limits,
    epochs: int = 1,
    shuffle_seed: int | Sequence[int] | None = None,
    rank_of: IntArray | None = None,
    hidden_size: int = 4096,
) -> BatchPlan:
    """Plans all optimizer steps of a batch.

    prompt_length, response_length, group: [S]; tokens, tokens, any integer shared by the responses to one prompt.
    groups_per_minibatch: prompts per optimizer step; the last step of an epoch may have fewer.
    shuffle_seed: draws a new order of the groups for every epoch; None: ascending group in all of them. Ranks are
        balanced for the first epoch's mini-batches and rows do not move: later shuffled epochs are balanced less well.
    rank_of: [S], to keep rows where another plan put them (the critic's, beside the actor's).
    hidden_size: of the model, for the share of attention in the cost.

    Raises ValueError where one sequence alone is over the token budget.
    """
    _check_budget(prompt_length, response_length, limits)
    assert rank_of is None or (len(rank_of) == len(group) and rank_of.max(initial=0) < num_ranks)
    cost = _Cost(prompt_length, response_length, group, limits, hidden_size)
    ranks: list[int] = [-1] * len(group) if rank_of is None else rank_of.tolist()
    minibatches: list[MiniBatch] = []
    for epoch in range(epochs):
        if epoch and shuffle_seed is None:
            minibatches += minibatches[: len(minibatches) // epoch]
            continue
        for rows in _minibatch_rows(group, groups_per_minibatch, shuffle_seed, epoch):
            if epoch == 0 and rank_of is None:
                _assign_ranks(rows, cost, num_ranks, ranks)
            minibatches.append(_plan_minibatch(rows, cost, num_ranks, ranks))
    return BatchPlan(tuple(minibatches), np.array(ranks, dtype=np.int64))


def plan_forward(
    prompt_length: npt.NDArray[np.integer],
    response_length: npt.NDArray[np.integer],
    group: npt.NDArray[np.integer],
    *,
    num_ranks: int,
    limits: Limits,
    rank_of: IntArray | None = None,
    hidden_size: int = 4096,
) -> MiniBatch:
    """Plans one pass over all rows; arguments as in `plan_batch`. Give it a batch's `rank_of` to stay on its ranks."""
    plan = plan_batch(
        prompt_length,
        response_length,
        group,
        groups_per_minibatch=max(len(group), 1),
        num_ranks=num_ranks,
        limits=limits,
        rank_of=rank_of,
        hidden_size=hidden_size,
    )
    return plan.minibatches[0] if plan.minibatches else MiniBatch(((),) * num_ranks)


def to_local(rank_plan: RankPlan, rows_of_rank: IntArray) -> RankPlan:
    """The same micro-batches as positions in `rows_of_rank` (ascending), which is how a rank knows its rows."""
    return tuple(tuple(np.searchsorted(rows_of_rank, rows).tolist()) for rows in rank_plan)


class _Chunk(NamedTuple):
    """Rows of one group that go together. size (what packing compares) and flops include the prompt."""

    rows: MicroBatchRows
    size: int
    flops: float


class _Cost:
    """Tokens and FLOPs of each row, apart from its group's prompt, which is counted per chunk.

    Without prompt sharing every row is a group of its own that brings its prompt along.

    FLOPs are in units of 2 * layers * hidden: 12 * hidden per token for the matrix products of a decoder layer with the
    usual shapes, and the sum over tokens of twice the causal context: P^2 for a prompt, R^2 + 2PR for a response.
    """

    def __init__(
        self,
        prompt_length: npt.NDArray[np.integer],
        response_length: npt.NDArray[np.integer],
        group: npt.NDArray[np.integer],
        limits: Limits,
        hidden_size: int,
    ) -> None:
        prompt, response = prompt_length.astype(np.float64), response_length.astype(np.float64)
        prompt_flops = prompt * (12.0 * hidden_size + prompt)
        flops = response * (12.0 * hidden_size + response + 2.0 * prompt)
        shared = limits.share_prompt
        self.limits = limits
        self.group: list[int] = (group if shared else np.arange(len(group))).tolist()
        self.prompt: list[int] = (prompt_length if shared else np.zeros_like(prompt_length)).tolist()
        self.tokens: list[int] = (response_length if shared else prompt_length + response_length).tolist()
        self.prompt_flops: list[float] = (prompt_flops if shared else np.zeros_like(prompt)).tolist()
        self.flops: list[float] = (flops if shared else flops + prompt_flops).tolist()

    @property
    def capacity(self) -> int:
        """Size of a full micro-batch."""
        return self.limits.max_tokens * (self.limits.max_sequences or 1)

    def chunk(self, rows: Sequence[int]) -> _Chunk:
        """These rows of one group, with its prompt."""
        first = rows[0]
        if len(rows) == 1:  # the usual case without prompt sharing: 8,192 of them are worth a short cut
            tokens = self.prompt[first] + self.tokens[first]
            flops = self.prompt_flops[first] + self.flops[first]
            return _Chunk((first,), self.size(tokens, 1, self.limits.max_tokens), flops)
        tokens = self.prompt[first] + sum([self.tokens[r] for r in rows])
        flops = self.prompt_flops[first] + sum([self.flops[r] for r in rows])
        return _Chunk(tuple(sorted(rows)), self.size(tokens, len(rows), self.limits.max_tokens), flops)

    def size(self, tokens: int, num_sequences: int, max_tokens: int) -> int:
        """The larger of the shares of the token budget and of the sequence limit, as an integer with `capacity` = 1.

        Shares add up, so a bin whose sizes sum to no more than the capacity keeps both limits.
        """
        if self.limits.max_sequences is None:
            return tokens
        return max(tokens * self.limits.max_sequences, num_sequences * max_tokens)

    def by_group(self, rows: Iterable[int]) -> list[list[int]]:
        """Rows sorted into lists, one per group, ascending group."""
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(self.group[row], []).append(row)
        return [members[g] for g in sorted(members)]


def _check_budget(
    prompt_length: npt.NDArray[np.integer], response_length: npt.NDArray[np.integer], limits: Limits
) -> None:
    longest = int((prompt_length + response_length).max(initial=0))
    if longest > limits.max_tokens:
        raise ValueError(
            f"{limits.key}={limits.max_tokens} is too small: one prompt with its response has {longest} tokens; "
            f"set it to at least {longest}"
        )


def _minibatch_rows(
    group: npt.NDArray[np.integer], groups_per_minibatch: int, seed: int | Sequence[int] | None, epoch: int
) -> list[list[int]]:
    """Rows of each mini-batch of one epoch; depends on nothing but the groups and the seed."""
    assert groups_per_minibatch > 0, "a mini-batch needs at least one prompt"
    member = np.unique(group, return_inverse=True)[1]
    num_groups = int(member.max(initial=-1)) + 1
    place = np.arange(num_groups)
    if seed is not None:
        entropy = [seed] if isinstance(seed, int) else list(seed)
        place = np.random.default_rng([*entropy, epoch]).permutation(num_groups)
    minibatch = place[member] // groups_per_minibatch
    order = np.argsort(minibatch, kind="stable")
    ends = np.cumsum(np.bincount(minibatch))
    return [rows.tolist() for rows in np.split(order, ends[:-1])] if num_groups else []


def _assign_ranks(rows: Sequence[int], cost: _Cost, num_ranks: int, rank_of: list[int]) -> None:
    """Gives each row a rank: the most expensive groups first, each whole to the least loaded rank; those that would
    put it over the mean (plus tolerance) are dealt out row by row at the end."""
    if num_ranks == 1:
        for row in rows:
            rank_of[row] = 0
        return
    chunks = sorted((cost.chunk(g) for g in cost.by_group(rows)), key=lambda c: -c.flops)
    target = sum(c.flops for c in chunks) / num_ranks * (1.0 + BALANCE_TOLERANCE)
    loads = [(0.0, rank) for rank in range(num_ranks)]
    split: list[_Chunk] = []
    for chunk in chunks:
        load, rank = loads[0]
        if len(chunk.rows) > 1 and load + chunk.flops > target:
            split.append(chunk)
            continue
        heapq.heapreplace(loads, (load + chunk.flops, rank))
        for row in chunk.rows:
            rank_of[row] = rank
    for chunk in split:
        _deal(chunk, cost, loads, target, rank_of)


def _deal(chunk: _Chunk, cost: _Cost, loads: list[tuple[float, int]], target: float, rank_of: list[int]) -> None:
    """Fills the least loaded rank up to the target with rows of this group, then the next; each pays for the prompt."""
    prompt = cost.prompt_flops[chunk.rows[0]]
    has_prompt: set[int] = set()
    load, rank = heapq.heappop(loads)
    for row in sorted(chunk.rows, key=lambda r: (-cost.flops[r], r)):
        if rank in has_prompt and load + cost.flops[row] > target:
            load, rank = heapq.heappushpop(loads, (load, rank))
        if rank not in has_prompt:
            has_prompt.add(rank)
            load += prompt
        load += cost.flops[row]
        rank_of[row] = rank
    heapq.heappush(loads, (load, rank))


def _plan_minibatch(rows: Sequence[int], cost: _Cost, num_ranks: int, rank_of: list[int]) -> MiniBatch:
    """Packs the rows of each rank into the same number of micro-batches, the most expensive first."""
    own: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in rows:
        own[rank_of[row]].append(row)
    chunks = [_chunks(r, cost) for r in own]
    packed = [_best_fit([c.size for c in part], cost.capacity) for part in chunks]
    count = max(len(bins) for bins in packed)
    return MiniBatch(
        tuple(
            _finish(_spread(part, count, cost.capacity) or [[part[i] for i in b] for b in bins], count)
            for part, bins in zip(chunks, packed, strict=True)
        )
    )


def _chunks(rows: Sequence[int], cost: _Cost) -> list[_Chunk]:
    """One chunk per group, or several where a group does not fit into one micro-batch; dearest first."""
    chunks: list[_Chunk] = []
    for members in cost.by_group(rows):
        whole = cost.chunk(members)
        if whole.size <= cost.capacity:
            chunks.append(whole)
            continue
        room = max(cost.limits.max_tokens - cost.prompt[members[0]], 1)
        sizes = [cost.size(cost.tokens[r], 1, room) for r in members]
        parts = _best_fit(sizes, room * (cost.limits.max_sequences or 1))
        chunks += [cost.chunk([members[i] for i in part]) for part in parts]
    return sorted(chunks, key=lambda c: -c.flops)


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `sizes` in bins whose sizes sum to at most `capacity`. O(n log n) comparisons."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        place = bisect_left(free, (size, -1))
        if place == len(free):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = free.pop(place)
        assert size <= room, "an item is larger than a bin"
        bins[number].append(index)
        insort(free, (room - size, number))
    return bins


def _spread(chunks: Sequence[_Chunk], num_bins: int, capacity: int) -> list[list[_Chunk]] | None:
    """Chunks (dearest first) in exactly `num_bins` bins of even FLOPs, or None where this greedy way does not fit."""
    bins: list[list[_Chunk]] = [[] for _ in range(num_bins)]
    free = [capacity] * num_bins
    loads = [(0.0, number) for number in range(num_bins)]
    for chunk in chunks:
        full: list[tuple[float, int]] = []
        while loads and free[loads[0][1]] < chunk.size and len(full) < SPREAD_TRIES:
            full.append(heapq.heappop(loads))
        if not loads or free[loads[0][1]] < chunk.size:
            return None
        load, number = loads[0]
        heapq.heapreplace(loads, (load + chunk.flops, number))
        free[number] -= chunk.size
        bins[number].append(chunk)
        for entry in full:
            heapq.heappush(loads, entry)
    return bins


def _finish(bins: list[list[_Chunk]], count: int) -> RankPlan:
    """Bins as rows, dearest first so that the ranks' micro-batches match, and empty ones up to `count`.

    Rows of a group lie side by side as long as the batch is ordered by group; otherwise a chunk repeats its prompt,
    which its size has counted.
    """
    bins.sort(key=lambda b: -sum(c.flops for c in b))
    rows = [tuple(r for c in sorted(b, key=lambda c: c.rows) for r in c.rows) for b in bins]
    return tuple(rows + [()] * (count - len(rows)))

"""Where the roles of a configuration lie: which devices each one has, and what cannot work there.

Device `r` is device `r % trainer.n_gpus_per_node` of node `r // trainer.n_gpus_per_node`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from trainer.config.devices import parse_device_mapping
from trainer.config.errors import UserError, show
from trainer.config.roles import training_roles
from trainer.config.schema import Config, DeviceMapping, RolloutConfig

_ROLLOUT = "actor_rollout_ref.rollout"


def role_devices(value: DeviceMapping, key: str, *, num_devices: int) -> tuple[int, ...]:
    """Return the global device ranks of a role; None means all of them.

    Raises ValueError for a mapping that cannot be read or that leaves the cluster.
    """
    if value is None:
        return tuple(range(num_devices))
    ranks = parse_device_mapping(value, key)
    if max(ranks) >= num_devices:
        raise UserError(
            f"{key}={show(value)}: rank {max(ranks)} does not exist, there are {num_devices} devices (ranks 0-"
            f"{num_devices - 1}); change it, or raise trainer.nnodes or trainer.n_gpus_per_node"
        )
    return ranks


def training_devices(cfg: Config, *, num_devices: int) -> dict[str, tuple[int, ...]]:
    """The global device ranks of each training role of the run: "actor", "ref", "critic"."""
    return {
        role.name: role_devices(role.config.device_mapping, f"{role.key}.device_mapping", num_devices=num_devices)
        for role in training_roles(cfg)
    }


def count_devices(mapping: DeviceMapping, key: str, *, num_devices: int) -> int | None:
    """Number of devices of a role; None where the mapping itself is wrong, which `device_problems` reports."""
    try:
        return len(role_devices(mapping, key, num_devices=num_devices))
    except UserError:
        return None


def replica_devices(cfg: Config) -> tuple[tuple[int, ...], ...]:
    """The global device ranks of each rollout replica: its tensor-parallel ranks, in the order of the mapping."""
    rollout = cfg.actor_rollout_ref.rollout
    ranks = role_devices(rollout.device_mapping, f"{_ROLLOUT}.device_mapping", num_devices=cfg.num_devices)
    return _cut(ranks, rollout.tensor_model_parallel_size)


def used_devices(cfg: Config) -> tuple[int, ...]:
    """The global device ranks that some role uses, ascending."""
    training = training_devices(cfg, num_devices=cfg.num_devices).values()
    return tuple(sorted({rank for ranks in (*training, *replica_devices(cfg)) for rank in ranks}))


def is_shared(cfg: Config, devices: Sequence[int]) -> bool:
    """Whether a training role uses one of these devices."""
    return any(set(ranks) & set(devices) for ranks in training_devices(cfg, num_devices=cfg.num_devices).values())


def frees_cache(rollout: RolloutConfig, *, shared: bool) -> bool:
    """Whether a replica gives memory back between calls. shared: with training; if not, `auto` does not."""
    return rollout.free_cache_engine and (shared or rollout.sleep_level != "auto")


def show_devices(ranks: Sequence[int]) -> str:
    """Ranks as a mapping that names them in this order, e.g. 0-3,8."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def check_shared_devices(cfg: Config) -> None:
    """Roles share a device's memory inside one process, which roles have together only where all devices are the same.

    Raises UserError where two training roles share some of their devices only, or take them in another order; on a CPU
    that does no harm.
    """
    devices = training_devices(cfg, num_devices=cfg.num_devices)
    keys: dict[str, str] = {role.name: role.key for role in training_roles(cfg)}
    for (other, theirs), (role, ranks) in combinations(devices.items(), 2):
        if ranks != theirs and set(ranks) & set(theirs):
            key, same = f"{keys[role]}.device_mapping", f"{keys[other]}.device_mapping"
            free = [rank for rank in range(cfg.num_devices) if rank not in theirs]
            apart = f", or to devices of its own, e.g. {show_devices(free)}" if free else ""
            how = "has the devices in another order than" if set(ranks) == set(theirs) else "shares some, not all, with"
            raise UserError(
                f"{key}={show_devices(ranks)}: {how} {same}={show_devices(theirs)}, so that each has processes of its "
                "own, and neither could make room for the other on a GPU; set it to "
                f"{show_devices(theirs)} as well{apart}"
            )


def device_problems(cfg: Config) -> Iterator[str]:
    """What is wrong with the mappings, whatever the devices are."""
    mappings: dict[str, DeviceMapping] = {}
    for role in training_roles(cfg):
        if role.config.device_mapping not in mappings.values():
            mappings[f"{role.key}.device_mapping"] = role.config.device_mapping
    mappings[f"{_ROLLOUT}.device_mapping"] = cfg.actor_rollout_ref.rollout.device_mapping
    for key, mapping in mappings.items():
        try:
            role_devices(mapping, key, num_devices=cfg.num_devices)
        except UserError as error:
            yield str(error)
        else:
            if key.startswith(_ROLLOUT):
                yield from _replicas_apart(cfg)


def unused_notice(cfg: Config) -> Iterator[str]:
    """That devices are left over."""
    used = set(used_devices(cfg))
    unused = [rank for rank in range(cfg.num_devices) if rank not in used]
    if unused:
        yield (
            f"no role uses device{'s' if len(unused) > 1 else ''} {show_devices(unused)} of the {cfg.num_devices} "
            f"(trainer.nnodes={cfg.trainer.nnodes} x trainer.n_gpus_per_node={cfg.trainer.n_gpus_per_node}); "
            "left free for other jobs"
        )


def _replicas_apart(cfg: Config) -> Iterator[str]:
    """Replicas whose devices lie on several nodes: the processes of one engine share a machine."""
    rollout, per_node = cfg.actor_rollout_ref.rollout, cfg.trainer.n_gpus_per_node
    size, replicas = rollout.tensor_model_parallel_size, replica_devices(cfg)
    apart = [number for number, ranks in enumerate(replicas) if _is_apart(ranks, per_node)]
    ranks = [rank for replica in replicas for rank in replica]
    if not apart or len(ranks) % size:  # the other is told elsewhere
        return
    in_order = sorted(ranks)
    if not any(_is_apart(replica, per_node) for replica in _cut(in_order, size)):
        remedy = f"set {_ROLLOUT}.device_mapping={show_devices(in_order)}"
    else:
        smaller = (n for n in range(size - 1, 0, -1) if size % n == 0)
        fits = next(n for n in smaller if not any(_is_apart(replica, per_node) for replica in _cut(ranks, n)))
        remedy = f"set {_ROLLOUT}.tensor_model_parallel_size={fits}, or change {_ROLLOUT}.device_mapping"
    yield (
        f"{_ROLLOUT}.tensor_model_parallel_size={size}: replica {apart[0]} would lie on devices "
        f"{show_devices(replicas[apart[0]])}, which are not on one node (trainer.n_gpus_per_node={per_node}); {remedy}"
    )


def _is_apart(ranks: Sequence[int], per_node: int) -> bool:
    return len({rank // per_node for rank in ranks}) > 1


def _cut(ranks: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ranks[first : first + size]) for first in range(0, len(ranks), size))

"""Where arrays live: the processes of a run, its mesh, and one rule for all arrays.

A mesh has two axes. Over `data` the devices share the examples of a batch; over `fsdp`
they share the examples and each large array of the state, too.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Arrays of fewer elements are whole on every device: norms, biases, heads of toys.
SMALLEST = 4096

# Seconds without a sign of life after which a process counts as dead, and the others
# end with an error.
_HEARTBEAT_TIMEOUT = 30


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of a run, before anything else asks JAX for devices.

    Args:
      coordinator: host and port of process 0.
      num_processes: how many there are.
      process_id: which of them this is. On a TPU pod, under Slurm and under Open MPI
        JAX finds out all three; elsewhere all are needed.

    Raises:
      ValueError: where an argument is missing and cannot be found out.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=2 * _HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:
        raise ValueError(
            "--distributed found no processes to join: this is neither a TPU pod nor a "
            f"job of Slurm or Open MPI ({error}) Start each process with --coordinator="
            "HOST:PORT of process 0, --num_processes=N and --process_id=0, ..., N-1; a "
            "run in one process needs none of these flags."
        ) from error


def here() -> dict[str, int]:
    """Return which process this is, and of how many, as the data pipeline takes it."""
    return {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def make(fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of all devices, or of those given.

    Args:
      fsdp: how many of them share each large array.
      devices: `jax.devices()`, those of all processes, by default.

    Raises:
      ValueError: where they cannot be grouped so.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"config.fsdp must divide the number of devices, which is {len(devices)}, "
            f"got {fsdp}."
        )
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )


def partition(shape: Sequence[int], fsdp: int) -> P:
    """Return how an array of the state is spread over the mesh.

    The largest axis that `fsdp` divides is cut; of several, the first. Nothing but the
    shape counts, so that a parameter, its mask and its optimizer slots lie alike, and
    neither an optimizer nor an algorithm needs a rule of its own.
    """
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < SMALLEST or not divisible:
        return P()
    largest = max(divisible, key=lambda axis: shape[axis])
    return P(*[None] * largest, "fsdp")


def sharding(mesh: Mesh | AbstractMesh, shape: Sequence[int]) -> NamedSharding:
    """Return the sharding of an array of the state."""
    return NamedSharding(mesh, partition(shape, mesh.shape["fsdp"]))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of a batch: every device has other examples."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def to_devices(mesh: Mesh, batch: Any) -> Any:
    """Return the global arrays of which each process has its own examples."""
    put = functools.partial(
        jax.make_array_from_process_local_data, batch_sharding(mesh)
    )
    return jax.tree.map(put, batch)


def to_host(mesh: Mesh, tree: Any) -> Any:
    """Return arrays of the state whole, in the memory of every process."""
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    return jax.device_get(whole(tree))

"""What `benchmarks/scale.py` reads from a compiled program is what is in it."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import scale
from configs import base, imagenet_rigl
from experiments import mesh


def test_traffic_of_steps_and_of_updates():
    devices = mesh.make()
    rows = NamedSharding(devices, P(("data", "fsdp")))
    whole = NamedSharding(devices, P())

    def search(x):
        """Sum a sharded array, pass after pass."""
        return lax.fori_loop(0, 5, lambda i, total: jnp.sum(x > total), 0)

    def step(x, due):
        gradient = x.T @ x  # [16, 16], a sum over the devices
        return gradient, lax.cond(due, search, lambda x: 0, x)

    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
    due = jax.ShapeDtypeStruct((), bool, sharding=whole)
    compiled = jax.jit(step, out_shardings=whole).lower(x, due).compile()
    found = scale.traffic(compiled.as_text())
    assert found.step == {"all-reduce": 16 * 16 * 4}
    assert found.update == {"all-reduce": scale.PASSES * 4}


def test_a_step_is_lowered_for_many_tpus():
    config = imagenet_rigl.get_config("smoke")
    config.batch_size, config.model = 256, base.Model(widths=(64,))
    assert scale.lower_for_tpu(config, 256, 8) > 10_000

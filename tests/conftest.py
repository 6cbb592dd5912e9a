"""Eight virtual CPU devices, strict JAX settings, and where the data sets are."""

import os
import pathlib

import hypothesis
import jax
import pytest
from absl import flags

DEVICES = 8

# In the environment too, for the tests that start a process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A collective holds one thread of XLA's pool per device until all have joined. The
# pool has a thread per core or per device, whichever is more: any other work in it
# then starves the collective, and the run hangs. XLA reads the size here.
os.environ.setdefault("NPROC", str(max(2 * DEVICES, os.cpu_count() or 1)))
# Most of a test's time is compilation, and most of that LLVM's work on kernels that run
# a few times. XLA's own passes remain. `make test-all` compiles as users do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false",
)

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Grain's worker processes read absl flags, which pytest never parses.
flags.FLAGS.mark_as_parsed()

hypothesis.settings.register_profile(
    "sparsejax", deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile("sparsejax")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs in pytest's cache, which `--cache-clear` empties.

    What a run finds compiled costs a quarter.
    """
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of prepared data sets, where there is one; skips where not."""
    folder = os.environ.get("SPARSEJAX_DATA_DIR", "")
    if not pathlib.Path(folder or "missing").is_dir():
        pytest.skip(f"SPARSEJAX_DATA_DIR must name a folder of data, got {folder!r}")
    return pathlib.Path(folder)

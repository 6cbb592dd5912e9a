"""What the training step costs on a pod, found by compilation, not by running it.

    python benchmarks/scale.py [--devices 256 1024] [--out results/scale.md]

Compiles the steps of `configs/imagenet_rigl.py` and `configs/imagenet_srigl_vit.py` for
meshes of that many virtual CPU devices, with every array a shape and a sharding, and
reads from the partitioned program what travels between devices and what a device
holds. No array is made. The steps are lowered for TPUs, too, on an abstract mesh, which
shows that nothing in them is of the CPU. The projected times rest on the assumptions
that the document lists.
"""

import argparse
import math
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

# A script finds its own folder first; the modules are named from the repository root.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from configs import base, imagenet_rigl, imagenet_srigl_vit  # noqa: E402
from experiments import data, mesh, report  # noqa: E402
from experiments.state import Training, prepare  # noqa: E402
from experiments.steps import make_train_step  # noqa: E402
from sparsejax import analysis  # noqa: E402

# The chip that times are projected for, and how well it is used: see ASSUMPTIONS.
FLOPS, USED, LINK = 197e12, 0.4, 100e9
# Passes of a search for a threshold: as many as a float32 has bits, at the most.
PASSES = 32

ASSUMPTIONS = f"""\
- A chip does {FLOPS / 1e12:.0f} TFLOP/s in bfloat16 (TPU v5e) and reaches {USED:.0%}
  of it in convolutions and matrix products, whatever their size: at 4 images a chip it
  will reach less. Zeros are multiplied as other numbers are.
- An all-reduce of b bytes takes 2b / ({LINK / 1e9:.0f} GB/s), an all-gather or a
  reduce-scatter half of it, and none overlaps with computation. Latency is left out:
  the many small ones of norms and of a mask update cost more than their bytes.
- A mask update makes {PASSES} passes in each search, which is the most; 8 to 15 are
  usual.
- Collectives are those that XLA's CPU backend leaves. It keeps all-reduces where a TPU
  would have a reduce-scatter of half the cost, and it does not combine small ones.
- Temporary memory is what the CPU backend plans, which neither fuses nor orders as a
  TPU compiler does: a rough figure. The state's is exact."""

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_COLLECTIVE = re.compile(
    r"= (\S.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)"
    r"(?:-start)?\("
)
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|(?:true|false)_computation)=%([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


class Traffic(NamedTuple):
    """Bytes that collectives leave a device: in a step, and more when masks change."""

    step: dict[str, float]
    update: dict[str, float]


def traffic(text: str) -> Traffic:
    """Read the collectives of a compiled program, by what they do.

    What a conditional calls belongs to the update. A loop in it is a search, which
    makes `PASSES` passes in all, however loops nest.
    """
    bodies = dict(_computations(text))
    found = Traffic({}, {})

    def visit(name: str, updates: bool, times: int) -> None:
        for line in bodies[name]:
            if match := _COLLECTIVE.search(line):
                result, kind = match.groups()
                bucket = found.update if updates else found.step
                bucket[kind] = bucket.get(kind, 0) + times * _size(result)
            conditional, loop = " conditional(" in line, " while(" in line
            for one, several in _CALLED.findall(line):
                for called in [one] if one else re.findall(r"%([\w.\-]+)", several):
                    passes = PASSES if loop and updates else times
                    visit(called, updates or conditional, passes)

    visit("ENTRY", False, 1)
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    for block in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", text):
        header, *lines = block.split("\n")
        if header.startswith("ENTRY "):
            yield "ENTRY", lines
        elif match := re.match(r"%([\w.\-]+) \(", header):
            yield match[1], lines


def _size(result: str) -> float:
    return sum(
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(result)
    )


def dataset(config: base.Config) -> data.Dataset:
    """Return ImageNet as far as a compiler must know it: its sizes."""
    size = config.data.image_size
    split = data.Split(np.zeros((1, size, size, 3), np.uint8), np.zeros(1, np.int32))
    moments = np.full(3, 128, np.float32)
    return data.Dataset(config.data, split, split, 1000, moments, moments)


def abstract_batch(config: base.Config, devices: Mesh | AbstractMesh) -> Any:
    """Return the shapes and the sharding of a batch."""
    sharding, size = mesh.batch_sharding(devices), config.data.image_size
    shape = (config.batch_size, size, size, 3)
    image = jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding)
    mixed = config.data.mixup or config.data.cutmix
    label = jax.ShapeDtypeStruct(
        (config.batch_size, 1000) if mixed else (config.batch_size,),
        np.float32 if mixed else np.int32,
        sharding=sharding,
    )
    return {"image": image, "label": label}


def train_flops(config: base.Config, training: Training) -> float:
    """Return the operations of one image, forwards and backwards."""
    model = nnx.merge(training.graphdef, training.abstract)["model"]
    model.eval()
    image = np.zeros((1, *dataset(config).image_shape), np.float32)
    return 3 * analysis.flops(model, image)


def measure(name: str, config: base.Config, devices: int, fsdp: int) -> dict[str, Any]:
    """Compile a training step for a mesh and return what is in it."""
    sharded = mesh.make(fsdp, devices=jax.devices()[:devices])
    training = prepare(config, dataset(config), sharded)
    step = make_train_step(training, dataset(config))
    begin = time.perf_counter()
    compiled = step.lower(training.abstract, abstract_batch(config, sharded)).compile(
        # The partitioner is what counts, and not the machine code.
        compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        }
    )
    seconds = time.perf_counter() - begin
    memory, moved = compiled.memory_analysis(), traffic(compiled.as_text())
    compute = train_flops(config, training) * config.batch_size / devices
    compute /= FLOPS * USED
    travel, update = _seconds(moved.step), _seconds(moved.update)
    return {
        "step of": name,
        "devices": devices,
        "fsdp": fsdp,
        "images a device": config.batch_size // devices,
        "MB a step": sum(moved.step.values()) / 1e6,
        "MB a mask update": sum(moved.update.values()) / 1e6,
        "state MB a device": memory.argument_size_in_bytes / 1e6,
        "temporary MB a device": memory.temp_size_in_bytes / 1e6,
        "projected ms": 1e3 * (compute + travel),
        "of it collectives": 1e3 * travel,
        "update more ms": 1e3 * update,
        "compile s": seconds,
    }


def _seconds(moved: dict[str, float]) -> float:
    return (
        sum(n * (2 if kind == "all-reduce" else 1) for kind, n in moved.items()) / LINK
    )


def lower_for_tpu(config: base.Config, devices: int, fsdp: int) -> int:
    """Lower a step for TPUs on an abstract mesh; return the size of the program."""
    abstract = AbstractMesh(
        (devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    training = prepare(config, dataset(config), abstract)
    traced = make_train_step(training, dataset(config)).trace(
        training.abstract, abstract_batch(config, abstract)
    )
    return len(traced.lower(lowering_platforms=("tpu",)).as_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--fsdp", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=pathlib.Path, default="results/scale.md")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(arguments.devices))
    configs = {
        "ResNet-50, RigL 80 %": imagenet_rigl.get_config(),
        "ViT-B/16, SRigL 90 %": imagenet_srigl_vit.get_config(),
    }
    rows = []
    for name, config in configs.items():
        for devices in arguments.devices:
            for fsdp in arguments.fsdp:
                lower_for_tpu(config, devices, fsdp)
                rows.append(measure(name, config, devices, fsdp))
                print(rows[-1], flush=True)
                write(arguments.out, rows)


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    shown = [[_round(value) for value in row.values()] for row in rows]
    path.write_text(
        "# A step on a pod, by compilation\n\n"
        f"Made by `python {' '.join(sys.argv)}` with jax {jax.__version__}, for "
        "batches of 4096 images of 224 pixels. Steps are compiled for virtual devices "
        "and not run; each is also lowered for TPUs on an abstract mesh.\n\n"
        + report.markdown_table(list(rows[0]), shown)
        + "\n\nMB are what collectives leave a device. `fsdp` is the number of devices "
        "that share each large array; 1 is plain data parallelism, in which a mask "
        "update sends nothing: every device finds the same masks in the same "
        "gradient.\n\n"
        f"## Assumptions\n\n{ASSUMPTIONS}\n"
    )


def _round(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

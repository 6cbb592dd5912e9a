"""The report of a run: `report.md`, a table of layers, and pictures."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs import base
from experiments import data, metrics
from experiments.files import replaced
from sparsejax import analysis
from sparsejax.masks.layout import named_leaves

FILE_NAME = "report.md"


def exists(folder: pathlib.Path) -> bool:
    """Return whether a run has its report, which is the last thing it writes."""
    return (folder / FILE_NAME).exists()


@jax.jit
def _count_active(masks: Any) -> Any:
    return jax.tree.map(jnp.sum, masks)


def densities(masks: Any) -> metrics.Record:
    """Return `density/<path>` of every mask, and `sparsity` of all together.

    Args:
      masks: bool arrays, None where a leaf is dense.
    """
    active = named_leaves(jax.device_get(_count_active(masks)))
    sizes = {path: mask.size for path, mask in named_leaves(masks).items()}
    total = sum(sizes.values())
    sparsity = 1 - sum(map(int, active.values())) / total if total else 0.0
    each = {f"density/{path}": int(active[path]) / sizes[path] for path in sizes}
    return {**each, "sparsity": sparsity}


def headline(record: Mapping[str, float]) -> dict[str, str]:
    """Return the few numbers of a line that a progress bar has room for."""
    names = ("train/loss", "test/accuracy")
    return {name: f"{record[name]:.4f}" for name in names if name in record}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table in even columns; numbers are aligned to the right."""
    columns = [[name, *values] for name, *values in zip(header, *rows, strict=True)]
    lines = zip(*map(_cells, columns), strict=True)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(column: Sequence[Any]) -> list[str]:
    """Return the cells of a column: its name, the rule below it, and its values."""
    is_number = all(isinstance(value, int | float) for value in column[1:])
    align = str.rjust if is_number else str.ljust
    name, *texts = map(str, column)
    width = max(map(len, ("--:", name, *texts)))
    rule = align(":", width, "-")
    return [align(name, width), rule, *(align(text, width) for text in texts)]


def layer_table(masks: Any) -> str:
    """Return a Markdown table, one line for each masked parameter and one for all."""
    active = named_leaves(jax.device_get(_count_active(masks)))
    rows = [
        (path, "x".join(map(str, mask.shape)), mask.size, int(active[path]))
        for path, mask in named_leaves(masks).items()
    ]
    rows.append(("together", "", sum(r[2] for r in rows), sum(r[3] for r in rows)))
    return markdown_table(
        ("parameter", "shape", "weights", "active", "density"),
        [(*row, f"{row[3] / row[2]:.2%}") for row in rows],
    )


def plot_history(
    records: Sequence[metrics.Record], names: Sequence[str], *, ax: Axes
) -> Axes:
    """Draw metrics over the steps, each where it was recorded."""
    for name in names:
        points = [(r["step"], r[name]) for r in records if name in r]
        ax.plot(*zip(*points, strict=True), marker=".", label=name)
    ax.set_xlabel("step")
    ax.legend()
    return ax


def write(
    folder: pathlib.Path,
    config: base.Config,
    dataset: data.Dataset,
    first_masks: Any,
    last_masks: Any,
) -> None:
    """Write `report.md` and its pictures into the folder of a complete run.

    Args:
      folder: has the `metrics.jsonl` of the run.
      config: of the run.
      dataset: what it was trained on.
      first_masks: before the first step, None where a leaf is dense.
      last_masks: after the last step.
    """
    records = metrics.read(folder)
    last = records[-1]
    tested = [record for record in records if "test/accuracy" in record]
    best = max(tested, key=lambda record: record["test/accuracy"])
    correct = round(last["test/accuracy"] * dataset.num_test)
    sections = [
        f"# {config.model.name} on {config.data.name}: {config.sparse.method}",
        f"Test accuracy **{last['test/accuracy']:.2%}** ({correct} of "
        f"{dataset.num_test} images) after {last['step']} steps of "
        f"{config.batch_size} images, at a sparsity of {last['sparsity']:.2%}.",
        f"The best of {len(tested)} evaluations was that of step {best['step']}, "
        f"{best['test/accuracy']:.2%}.",
        "## Training",
        _picture(folder, "history", lambda figure: _draw_history(figure, records)),
        "## Layers",
    ]
    if named_leaves(last_masks):
        sections += [
            layer_table(last_masks),
            _picture(
                folder, "density", lambda figure: _draw_densities(figure, records)
            ),
            "## Masks before and after",
            _picture(
                folder,
                "masks",
                lambda figure: _draw_masks(
                    figure, dataset.image_shape, first_masks, last_masks
                ),
            ),
        ]
    else:
        sections += ["Every weight is trained."]
    settings = json.dumps(dataclasses.asdict(config), indent=2)
    sections += ["## Config", f"```json\n{settings}\n```"]
    with replaced(folder / FILE_NAME) as file:
        file.write("\n\n".join(sections) + "\n")


def _picture(folder: pathlib.Path, name: str, draw: Callable[[Figure], None]) -> str:
    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure)
    figure.savefig(folder / f"{name}.png", dpi=110)
    return f"![{name}]({name}.png)"


def _draw_history(figure: Figure, records: Sequence[metrics.Record]) -> None:
    loss, accuracy = figure.subplots(1, 2)
    plot_history(records, ["train/loss", "test/loss"], ax=loss)
    plot_history(records, ["train/accuracy", "test/accuracy"], ax=accuracy)


def _draw_densities(figure: Figure, records: Sequence[metrics.Record]) -> None:
    prefix = "density/"
    names = [name for name in records[-1] if name.startswith(prefix)]
    last = {name.removeprefix(prefix): records[-1][name] for name in names}
    figure.set_figheight(max(4, 0.25 * len(names)))
    at_the_end, over_time = figure.subplots(1, 2)
    analysis.plot_densities(last, ax=at_the_end)
    plot_history(records, ["sparsity"], ax=over_time)
    over_time.set_ylim(0, 1)


def _draw_masks(
    figure: Figure, image_shape: Sequence[int], first_masks: Any, last_masks: Any
) -> None:
    """Draw the first layer that is sparse, and how often it looks at each pixel."""
    first, last = named_leaves(first_masks), named_leaves(last_masks)
    path = next((p for p in last if not np.asarray(last[p]).all()), next(iter(last)))
    masks = [np.asarray(first[path]), np.asarray(last[path])]
    sees_image = masks[0].shape[:-1] == (np.prod(image_shape),)
    figure.set_figheight(7)
    rows = figure.subplots(
        2, 1 + sees_image, squeeze=False, width_ratios=[2.5, 1][: 1 + sees_image]
    )
    for row, mask, when in zip(rows, masks, ("before", "after"), strict=True):
        analysis.plot_mask(mask, ax=row[0])
        row[0].set_title(f"{path} {when} training")
        if sees_image:
            most = max(
                mask.sum(axis=1).reshape(image_shape).sum(axis=-1).max()
                for mask in masks
            )
            analysis.plot_input_connections(mask, image_shape, vmax=most, ax=row[1])

"""Exact selection of the k largest scores, without sorting and without gathering.

Scores are compared and counted, never moved: on a weight that is sharded over a mesh
a pass exchanges a few integers per device, and the mask is sharded as the weight is.
The search itself is in `sparsejax.masks._search`.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from numpy.lib.array_utils import normalize_axis_tuple

from sparsejax.masks import _search


def top_k_mask(
    scores: jax.Array,
    k: chex.Numeric,
    *,
    axis: int | Sequence[int] | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """Select the ``k`` largest scores.

    Ties go to the lowest index in row-major order, so the result is the same on
    every device, mesh and backend. A NaN is never selected: where fewer than ``k``
    scores are eligible, all of those are.

    Args:
      scores: float32, bfloat16 or float16 array of any shape. -0 equals +0;
        denormals and infinities are ordered like any other number.
      k: how many to select, an integer or an integer array, traced or not. With
        ``axis`` it may also hold one value per slice, in the shape that a reduction
        of ``scores`` over ``axis`` has. Less than 0 counts as 0.
      axis: the axis or axes of a slice; ``None`` selects in the whole array.
      where: bool array of the shape of ``scores``; only positions that are ``True``
        are eligible. ``None`` means all.

    Returns:
      Bool array of the shape and sharding of ``scores``, with exactly ``k`` entries
      ``True`` in the array, or in each slice.

    Raises:
      TypeError: the scores are not float32, bfloat16 or float16, or ``k`` is not an
        integer.
      ValueError: the shapes of ``scores``, ``where`` and ``k`` do not fit, or the
        array has 2**31 elements or more.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masks
      >>> masks.top_k_mask(jnp.array([1.0, 5.0, 3.0, 5.0]), 2).tolist()
      [False, True, False, True]
      >>> masks.top_k_mask(jnp.array([[1.0, 2.0], [4.0, 3.0]]), 1, axis=1).tolist()
      [[False, True], [True, False]]
    """
    (mask,) = top_k_masks([scores], [k], axis=[axis], where=[where])
    return mask


def top_k_masks(
    scores: Sequence[jax.Array],
    k: Sequence[chex.Numeric],
    *,
    axis: Sequence[int | Sequence[int] | None] | None = None,
    where: Sequence[jax.Array | None] | None = None,
) -> list[jax.Array]:
    """Select the ``k[i]`` largest of ``scores[i]``, for all arrays in one search.

    The same as `top_k_mask` of each, compiled once and run as one loop.

    Args:
      scores: arrays, of any supported dtypes.
      k: for each array what `top_k_mask` takes.
      axis: for each array what `top_k_mask` takes; ``None``: whole arrays.
      where: for each array what `top_k_mask` takes; ``None``: all is eligible.

    Returns:
      List of bool arrays.

    Raises:
      TypeError, ValueError: as `top_k_mask`.
    """
    scores = [jnp.asarray(s) for s in scores]
    where = [None] * len(scores) if where is None else where
    offers = [(s, w, None) for s, w in zip(scores, where, strict=True)]
    axes = checked_axes(scores, where, axis)
    wanted = checked_k(k, scores, axes)
    given = lambda _, selected, offers: offers
    return _search.select(given, lambda *_: wanted, offers, scores, axes)


def kth_largest(
    scores: jax.Array,
    k: chex.Numeric,
    *,
    axis: int | Sequence[int] | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """Return the value of the ``k``-th largest score.

    Arguments and errors are those of `top_k_mask`; ``k = 1`` is the maximum. NaN
    scores do not count.

    Returns:
      Array of the dtype of ``scores``: a scalar, or one value per slice; NaN where
      there is none, because ``k`` is 0 or fewer than ``k`` scores are eligible.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masks
      >>> float(masks.kth_largest(jnp.array([1.0, 5.0, 3.0]), 2))
      3.0
    """
    scores = jnp.asarray(scores)
    (axes,) = checked_axes([scores], [where], [axis])
    k = checked_k([k], [scores], [axes])
    slices = _search.Slices([scores], [axes], shared=False)
    count = slices.counter([_search.keys_of(scores, where, None)])
    bound = slices.constant([_search.key_bound(scores.dtype)])
    k += _search.zero_of([scores])
    found = _search.search(count, k, bound, exact=True)
    shape = [n for i, n in enumerate(scores.shape) if i not in axes]
    return _search.scores_of(found.threshold, scores.dtype).reshape(shape)


def global_top_k_mask(
    scores: chex.ArrayTree, k: chex.Numeric, *, where: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    """Select the ``k`` largest scores of all leaves of a tree together.

    Args:
      scores: tree of float arrays of one dtype.
      k: how many to select in all, an integer, traced or not.
      where: tree like ``scores`` of bool arrays: what is eligible. ``None``: all.

    Returns:
      Tree like ``scores`` of bool arrays with exactly ``k`` entries ``True``. Ties
      go to the first leaf in tree order and there to the lowest index.

    Raises:
      TypeError: leaves of different or unsupported dtypes, or ``k`` no integer.
      ValueError: shapes do not fit, no leaves, or 2**31 elements or more in all.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import masks
      >>> scores = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0])}
      >>> {name: m.tolist() for name, m in masks.global_top_k_mask(scores, 2).items()}
      {'a': [False, True], 'b': [True]}
    """
    leaves, treedef = jax.tree.flatten(scores)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if not leaves:
        raise ValueError("global_top_k_mask(scores): the tree has no leaves.")
    allowed = [None] * len(leaves) if where is None else treedef.flatten_up_to(where)
    axes = checked_axes(leaves, allowed, together=True)
    wanted = checked_k([k], [jnp.zeros(())], [()])
    offers = [(s, w, None) for s, w in zip(leaves, allowed, strict=True)]
    given = lambda _, selected, offers: offers
    masks = _search.select(given, lambda *_: wanted, offers, leaves, axes, shared=True)
    return treedef.unflatten(masks)


def checked_axes(scores, where, axis=None, *, together=False) -> list[tuple[int, ...]]:
    """Check scores and where; return the axes of a slice of each array, in order."""
    dtypes = sorted({str(score.dtype) for score in scores})
    if together and len(dtypes) > 1:
        raise TypeError(
            f"Scores that are compared must have one dtype, got {', '.join(dtypes)}; "
            "cast them first."
        )
    _check_size(sum(score.size for score in scores) if together else 0)
    axis = [None] * len(scores) if axis is None else axis
    checked = []
    for score, allowed, over in zip(scores, where, axis, strict=True):
        if score.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(
                f"Scores must be float32, bfloat16 or float16, got {score.dtype}."
            )
        if allowed is not None and allowed.shape != score.shape:
            raise ValueError(
                f"where= must have the shape of the scores, {score.shape}, "
                f"got {allowed.shape}."
            )
        _check_size(score.size)
        over = tuple(range(score.ndim)) if over is None else over
        checked.append(tuple(sorted(normalize_axis_tuple(over, score.ndim))))
    return checked


def checked_k(k, scores, axes) -> jax.Array:
    """Check each ``k`` against the slices of its array; return int32 [slices]."""
    parts = []
    for one, score, over in zip(k, scores, axes, strict=True):
        one = jnp.asarray(one)
        if not jnp.issubdtype(one.dtype, jnp.integer):
            raise TypeError(f"k must be an integer, got dtype {one.dtype}.")
        slices = tuple(n for i, n in enumerate(score.shape) if i not in over)
        if one.shape not in ((), slices):
            raise ValueError(
                f"k must be a scalar or hold one value per slice, shape {slices}, "
                f"got shape {one.shape}."
            )
        one = jnp.broadcast_to(jnp.maximum(one.astype(jnp.int32), 0), slices)
        parts.append(one.reshape(-1))
    return jnp.concatenate(parts)


def _check_size(size: int) -> None:
    if size >= 2**31:
        raise ValueError(
            "A selection counts in int32 and takes fewer than 2**31 scores, got "
            f"{size}; select leaf by leaf instead."
        )

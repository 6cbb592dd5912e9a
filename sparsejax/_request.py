"""From what a user asks for to the leaves that are sparse and what each keeps."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import distributions
from sparsejax._trees import draw_masks, tree_at
from sparsejax.distributions import Distribution
from sparsejax.masks.layout import Layout, Leaf, Where, select_leaves
from sparsejax.masks.patterned import Patterned, Patterns, patterned_leaves
from sparsejax.masks.patterns import NM, Block

# What weights are ranked with: those of their own layer, or of all sparse leaves.
Scope = Literal["layer", "global"]

_NAMED = {"erk": distributions.erk, "uniform": distributions.uniform}


class Request(NamedTuple):
    """What a factory was asked for; checked by `check`."""

    owner: str
    sparsity: float
    distribution: str | Distribution
    where: Where
    layout: Mapping[str, Layout] | None
    pattern: Patterns = None

    def check(self) -> "Request":
        """Return the request; raise if its values cannot be meant, naming the owner."""
        check_sparsity(f"{self.owner}(sparsity=...)", self.sparsity)
        if not callable(self.distribution) and self.distribution not in _NAMED:
            raise ValueError(
                f"{self.owner}(distribution=...) must be one of {sorted(_NAMED)} or a "
                f"function (shapes, sparsity) -> kept, got {self.distribution!r}."
            )
        if isinstance(self.where, Mapping):
            for pattern, sparsity in self.where.items():
                _check_regex(self.owner, "where", pattern)
                check_sparsity(f"{self.owner}(where={{{pattern!r}: ...}})", sparsity)
        elif self.where is not None and not callable(self.where):
            raise TypeError(
                f"{self.owner}(where=...) must be None, a predicate on (path, leaf) or "
                f"a dict from regex to sparsity, got {type(self.where).__name__}."
            )
        if not isinstance(self.layout, Mapping | None):
            raise TypeError(
                f"{self.owner}(layout=...) must be None or a dict from regex to "
                f"sparsejax.masks.Layout, got {type(self.layout).__name__}."
            )
        for pattern, layout in (self.layout or {}).items():
            _check_regex(self.owner, "layout", pattern)
            if not isinstance(layout, Layout):
                raise TypeError(
                    f"{self.owner}(layout={{{pattern!r}: ...}}) must be a "
                    f"sparsejax.masks.Layout, got {type(layout).__name__}."
                )
        self._check_patterns()
        return self

    def _check_patterns(self) -> None:
        pattern = self.pattern
        if isinstance(pattern, Mapping):
            for regex, own in pattern.items():
                _check_regex(self.owner, "pattern", regex)
                if not isinstance(own, NM | Block | None):
                    raise TypeError(
                        f"{self.owner}(pattern={{{regex!r}: ...}}) must be a "
                        "sparsejax.masks.NM, a sparsejax.masks.Block or None, got "
                        f"{own!r}."
                    )
        elif not isinstance(pattern, NM | Block | None) and not callable(pattern):
            raise TypeError(
                f"{self.owner}(pattern=...) must be a sparsejax.masks.NM or Block, a "
                "dict from regex to one of them, a function (path, shape) -> pattern "
                f"or None, got {pattern!r}."
            )
        if isinstance(pattern, NM):
            own = 1 - pattern.n / pattern.m
            if not math.isclose(self.sparsity, own, abs_tol=1e-9):
                raise ValueError(
                    f"{self.owner}(sparsity=...) must be that of pattern={pattern}, "
                    f"1 - {pattern.n}/{pattern.m} = {own:.6g}, got {self.sparsity!r}. "
                    "Where other leaves are to have another sparsity, give the pattern "
                    "to its own by a dict from regex to pattern."
                )

    def check_scope(self, scope: Scope) -> None:
        """Raise ValueError unless the scope is one, and fits what was asked for."""
        if scope not in ("layer", "global"):
            raise ValueError(
                f'{self.owner}(scope=...) must be "layer" or "global", got {scope!r}.'
            )
        if scope == "layer":
            return
        if isinstance(self.where, Mapping) and any(self.where.values()):
            raise ValueError(
                f'{self.owner}(scope="global") ranks all leaves together, so where= '
                "cannot give a leaf a sparsity of its own; use 0 or a predicate, got "
                f"{self.where}."
            )
        if self.pattern is not None:
            raise ValueError(
                f'{self.owner}(scope="global") ranks the weights of all leaves '
                "together, and a pattern those of each: use "
                f'scope="layer" with pattern={self.pattern}.'
            )

    def leaves(self, params: Any) -> dict[str, Leaf]:
        """Return the leaves of ``params`` that are to be sparse, by path."""
        return select_leaves(params, where=self.where, layout=self.layout)

    def patterned(self, leaves: Sequence[Leaf]) -> list[Patterned]:
        """Return the leaves with their patterns."""
        return patterned_leaves(leaves, self.pattern)

    def draw(self, params: Any, key: jax.Array) -> tuple[Any, Any]:
        """Return random masks and their budgets, trees like ``params``."""
        leaves = self.leaves(params)
        budgets = self.budgets(leaves)
        masks = draw_masks(params, self.patterned([*leaves.values()]), budgets, key)
        return masks, tree_at(params, budgets)

    def budgets(self, leaves: Mapping[str, Leaf]) -> dict[str, jax.Array]:
        """Return how many weights each leaf keeps, one number for a stacked layer."""
        patterned = {leaf.path: leaf for leaf in self.patterned([*leaves.values()])}
        own = {p: leaf.sparsity for p, leaf in leaves.items()}
        for path, leaf in patterned.items():
            if isinstance(leaf.pattern, NM):
                self._check_own(path, leaf.pattern, own[path])
                own[path] = 0.0  # whatever it is given, its pattern says what is kept
        shared = {p: leaf for p, leaf in leaves.items() if own[p] is None}
        kept = {
            path: distributions.uniform(_layers(leaves[path]), sparsity)
            for path, sparsity in own.items()
            if sparsity is not None
        }
        shapes = {n: s for leaf in shared.values() for n, s in _layers(leaf).items()}
        if shapes:
            distribution = self.distribution
            if not callable(distribution):
                distribution = _NAMED[distribution]
            given = distribution(shapes, self.sparsity)
            self._check_given(given, shapes)
            kept |= {p: {n: given[n] for n in _layers(x)} for p, x in shared.items()}
        return {
            path: _stack(leaves[path], [leaf.budget(n) for n in kept[path].values()])
            for path, leaf in patterned.items()
        }

    def budget_of_all(self, leaves: Mapping[str, Leaf]) -> int:
        """Return how many weights all leaves keep together, with "global" scope."""
        size = sum(math.prod(leaf.shape) for leaf in leaves.values())
        return distributions.uniform({"all": (size,)}, self.sparsity)["all"]

    def _check_own(self, path: str, pattern: NM, sparsity: float | None) -> None:
        if sparsity is not None:
            raise ValueError(
                f"{self.owner}: {pattern} says how sparse {path} is, and so does "
                f"where={{...: {sparsity}}}. Leave one of them out for this leaf."
            )

    def _check_given(self, given: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{self.owner}(distribution=...) must give a dict from path to the "
                f"number of weights kept, got {type(given).__name__}."
            )
        for path, shape in shapes.items():
            n: Any = given.get(path)
            whole = isinstance(n, int | np.integer) and not isinstance(n, bool)
            if not whole or not 0 <= n <= math.prod(shape):
                raise ValueError(
                    f"{self.owner}(distribution=...) must give an integer between 0 "
                    f"and {math.prod(shape)}, the size of {path}, got {n!r}."
                )


def check_sparsity(what: str, sparsity: Any) -> None:
    """Raise ValueError unless ``sparsity`` is a number in [0, 1)."""
    try:
        distributions.rational(sparsity)
    except (TypeError, ValueError):
        raise ValueError(
            f"{what} is the fraction of weights that are zero and must lie in [0, 1), "
            f"got {sparsity!r}."
        ) from None


def _check_regex(owner: str, argument: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{owner}({argument}=...): keys are regular expressions on paths, got "
            f"{pattern!r}: {error}."
        ) from None


def _layers(leaf: Leaf) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each layer that a leaf stacks; often just one."""
    shape = leaf.layout.layer_shape(leaf.shape)
    stack = _stack_shape(leaf)
    if not stack:
        return {leaf.path: shape}
    return {f"{leaf.path}{list(index)}": shape for index in np.ndindex(*stack)}


def _stack_shape(leaf: Leaf) -> tuple[int, ...]:
    return tuple(leaf.shape[i] for i in leaf.layout.resolve(len(leaf.shape)).batch)


def _stack(leaf: Leaf, kept: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.array(kept, np.int32).reshape(_stack_shape(leaf)))


def check_key(owner: str, key: Any) -> None:
    """Raise TypeError unless ``key`` is one PRNG key, or None."""
    if key is None:
        return
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == jnp.uint32 and shape == jax.random.key_data(jax.random.key(0)).shape
    if not (typed and shape == ()) and not raw:
        raise TypeError(
            f"{owner}(key=...) must be one PRNG key, such as jax.random.key(0), got "
            f"{key!r}; map over several with jax.vmap."
        )

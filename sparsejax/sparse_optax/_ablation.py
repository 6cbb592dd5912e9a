"""Which neurons may be ablated, and what goes with them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsejax.masks.coupled import Group, check_members

Protect = str | Sequence[str] | Callable[[str, Any], bool] | None

# Names of output layers: the whole name of a module on the path.
OUTPUT_LAYER = r"(^|/)(heads?|fc|classifier|logits|output|readout|predictions?)(/|$)"


def checked_protect(protect: Protect) -> Any:
    """Return None, a predicate, or a tuple of regexes."""
    if protect is None or callable(protect):
        return protect
    patterns = (protect,) if isinstance(protect, str) else tuple(protect)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                "srigl(protect=...) takes regular expressions on paths, or a predicate "
                f"on (path, leaf), got {pattern!r}: {error}."
            ) from None
    return patterns


def checked_groups(groups: Any) -> tuple[Any, ...]:
    """Return the groups of a report, or those given; none for None."""
    given = getattr(groups, "groups", groups)
    try:
        groups = () if given is None else tuple(given)
        valid = all(hasattr(g, "members") and hasattr(g, "pinned") for g in groups)
    except TypeError:
        valid = False
    if not valid:
        raise TypeError(
            "srigl(groups=...) must be what sparsejax.compaction.channel_groups "
            f"returns, or its groups, got {type(given).__name__}."
        )
    return groups


def protected_leaves(
    named: Mapping[str, Any], protect: Protect, groups: Sequence[Any], gamma: float
) -> set[str]:
    """Return the paths of the leaves of which no neuron is ablated."""
    pinned = [group for group in groups if group.pinned is not None]
    found = {path for group in pinned for path in _paths(group, "producer")}
    if callable(protect):
        matched = {path for path, leaf in named.items() if protect(path, leaf)}
        if not matched:
            raise ValueError(
                "srigl(protect=...): the predicate must be true for the output layer, "
                f"and is for none of {', '.join(named)}."
            )
        return found | matched
    if protect is None:
        protect = () if groups or gamma == 0 else (OUTPUT_LAYER,)
    for pattern in protect:
        matched = {path for path in named if re.search(pattern, path)}
        if not matched and pattern == OUTPUT_LAYER:
            raise ValueError(
                "srigl must know the output layer, of which it ablates no neuron, and "
                f"none of these has one of its usual names: {', '.join(named)}. Pass "
                "protect=, a regex for its path, or () to ablate neurons everywhere."
            )
        if not matched:
            raise ValueError(
                f"srigl(protect=...): the pattern {pattern!r} must match a parameter "
                f"and matches none of {', '.join(named)}. Correct or remove it."
            )
        found |= matched
    return found


def emitted_leaves(
    named: Mapping[str, Any], groups: Sequence[Any], ablatable: set[str]
) -> set[str]:
    """Return the paths of what channels emit that may be ablated, weights apart."""
    found = set()
    for group in groups:
        producers = _paths(group, "producer")
        if not producers or not producers <= ablatable:
            continue
        check_members("srigl(groups=...)", [group], named, roles=("norm",))
        found |= _paths(group, "norm")
    return found


def _paths(group: Group, role: str) -> set[str]:
    return {member.path for member in group.members if member.role == role}

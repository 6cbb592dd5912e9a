"""Classes of atoms against an oracle that reads the relations one by one."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.compaction.classes import Classes

N = 6  # plain atoms
atom = st.integers(0, N - 1)


@st.composite
def relations(draw):
    """Draw unions of atoms, and products of two or three of them that get a name."""
    steps = []
    for _ in range(draw(st.integers(1, 7))):
        known = st.integers(0, N - 1 + sum(kind == "product" for kind, *_ in steps))
        if draw(st.booleans()):
            steps.append(("unite", draw(known), draw(known)))
        else:
            factors = draw(st.lists(known, min_size=2, max_size=3, unique=True))
            steps.append(("product", factors))
    return steps


def build(steps):
    """Return the classes, and the number of every atom by its place in `steps`."""
    classes = Classes()
    atoms = list(classes.fresh(N))
    for kind, *rest in steps:
        if kind == "unite":
            a, b = (np.array([atoms[i]]) for i in rest)
            classes.unite(a, b)
        else:
            factors = [np.array([atoms[i]]) for i in rest[0]]
            atoms.append(classes.products(factors)[0])
    return classes, np.array(atoms)


def consistent(alive, steps):
    """Say whether an assignment of life to all atoms satisfies every relation."""
    product = N
    for kind, *rest in steps:
        if kind == "unite":
            if alive[rest[0]] != alive[rest[1]]:
                return False
        else:
            if alive[product] != all(alive[i] for i in rest[0]):
                return False
            product += 1
    return True


@settings(max_examples=150, deadline=None)
@given(relations(), st.data())
def test_killing_leaves_satisfies_every_relation(steps, data):
    classes, atoms = build(steps)
    resolved = classes.resolve()
    leaves = np.flatnonzero(resolved.marks(atoms))
    killed = data.draw(st.lists(st.sampled_from(leaves.tolist()), unique=True))
    dead = np.zeros(len(resolved.roots), bool)
    dead[killed] = True
    assert consistent(~resolved.spread(dead)[atoms], steps)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(atom, atom), max_size=8))
def test_without_products_classes_are_connected_components(pairs):
    classes = Classes()
    atoms = classes.fresh(N)
    a, b = (np.array([pair[i] for pair in pairs], int) for i in (0, 1))
    classes.unite(atoms[a], atoms[b])
    reach = np.eye(N, dtype=bool)
    reach[a, b] = reach[b, a] = True
    for _ in range(N):
        reach = reach @ reach
    roots = classes.roots(atoms)
    assert np.array_equal(roots[:, None] == roots[None], reach)


def test_equal_products_are_united_factor_by_factor():
    classes = Classes()
    heads, dims, more_heads, more_dims = (classes.fresh(n) for n in (2, 3, 2, 3))
    places = np.unravel_index(np.arange(6), (2, 3))
    one = classes.products([heads[places[0]], dims[places[1]]])
    other = classes.products([more_heads[places[0]], more_dims[places[1]]])
    classes.unite(one, other)
    assert np.array_equal(classes.roots(heads), classes.roots(more_heads))
    assert np.array_equal(classes.roots(dims), classes.roots(more_dims))
    # Nothing else became one.
    resolved = classes.resolve()
    assert len(np.flatnonzero(resolved.marks(one))) == 5


def test_products_that_do_not_fit_become_one_class():
    classes = Classes()
    pairs, triples = classes.fresh(2), classes.fresh(3)
    one = classes.products([pairs[[0]], pairs[[1]]])
    other = classes.products([triples[[0]], triples[[1]], triples[[2]]])
    classes.unite(one, other)
    everything = np.concatenate([pairs, triples, one, other])
    assert len(set(classes.roots(everything).tolist())) == 1


def test_leaf_columns_name_the_factors():
    classes = Classes()
    plain, heads, dims = (classes.fresh(n) for n in (1, 2, 2))
    places = np.unravel_index(np.arange(4), (2, 2))
    product = classes.products([heads[places[0]], dims[places[1]]])
    columns = classes.resolve().leaf_columns(np.concatenate([plain, product]))
    expected = [(plain[0], -1), *itertools.product(heads, dims)]
    assert columns.tolist() == [list(row) for row in expected]

"""Which channel indices live and die together.

Every index of every axis of interest is an atom. Atoms that must share their fate are
united (union-find over whole arrays at a time). An atom may be a product: it is alive
where all its factors are, as index ``h * 64 + d`` of a fused projection is alive where
head ``h`` and dimension ``d`` are.
"""

import dataclasses

import numpy as np

Atoms = np.ndarray  # [n], ids of atoms


class Classes:
    """Equivalence classes of atoms, some of them products of others."""

    def __init__(self):
        self._parent = np.zeros(0, np.int64)
        self._is_product = np.zeros(0, bool)
        self._factors: dict[int, tuple[int, ...]] = {}
        self._count = 0

    def fresh(self, n: int) -> Atoms:
        """Return n new atoms, each a class of its own."""
        start, self._count = self._count, self._count + n
        if self._count > self._parent.size:
            grown = max(2 * self._count, 1024)
            more = np.arange(self._parent.size, grown)
            self._parent = np.concatenate([self._parent, more])
            self._is_product = np.resize(self._is_product, grown)
            self._is_product[start:] = False
        return np.arange(start, self._count)

    def roots(self, atoms: Atoms) -> Atoms:
        """Return the representatives of the atoms' classes."""
        found = self._parent[atoms]
        while True:
            further = self._parent[found]
            if np.array_equal(further, found):
                self._parent[atoms] = found
                return found
            found = further

    def unite(self, a: Atoms, b: Atoms) -> None:
        """Unite atoms ``a[i]`` and ``b[i]`` for every i."""
        if a is b:
            return
        a, b = self.roots(a), self.roots(b)
        product = self._is_product[a] | self._is_product[b]
        self._link(a[~product], b[~product])
        for x, y in zip(a[product], b[product], strict=True):
            self._unite_products(int(x), int(y))

    def products(self, factors: list[Atoms]) -> Atoms:
        """Return new atoms, the i-th alive where all ``factors[k][i]`` are."""
        if len(factors) == 1:
            return factors[0]
        made = self.fresh(len(factors[0]))
        self._is_product[made] = True
        columns = zip(*(column.tolist() for column in factors), strict=True)
        self._factors.update(zip(made.tolist(), columns, strict=True))
        return made

    def leaves(self, atom: int) -> tuple[int, ...]:
        """Return the representatives of all that an atom is a product of."""
        root = self._root(atom)
        if root not in self._factors:
            return (root,)
        return tuple(x for factor in self._factors[root] for x in self.leaves(factor))

    def _root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            atom = self._parent[atom]
        return int(atom)

    def _link(self, a: Atoms, b: Atoms) -> None:
        """Unite roots that are no products."""
        while True:
            differ = a != b
            a, b = a[differ], b[differ]
            if not a.size:
                return
            self._parent[np.maximum(a, b)] = np.minimum(a, b)
            a, b = self.roots(a), self.roots(b)

    def _unite_products(self, x: int, y: int) -> None:
        """Unite two atoms of which one at least is, or was, a product.

        Products of equally many leaves are united leaf by leaf. Others, and a product
        with its own factor, become one class with all their leaves: coarser than need
        be, and never wrong.
        """
        x, y = self._root(x), self._root(y)
        if x == y:
            return
        in_x, in_y = self.leaves(x), self.leaves(y)
        factors = [self._factors.pop(x, ()), self._factors.pop(y, ())]
        low, high = min(x, y), max(x, y)
        self._parent[high] = low
        self._is_product[[low, high]] = False
        if all(factors) and len(in_x) == len(in_y):
            self._set_factors(low, in_x)
            pairs = zip(in_x, in_y, strict=True)
        elif any(factors) and not all(factors) and not set(in_x) & set(in_y):
            self._set_factors(low, factors[0] or factors[1])
            pairs = ()
        else:
            pairs = ((leaf, low) for leaf in {*in_x, *in_y} - {x, y})
        for leaf, other in pairs:
            self._unite_products(leaf, other)

    def _set_factors(self, root: int, factors: tuple[int, ...]) -> None:
        self._factors[root] = factors
        self._is_product[root] = True

    def resolve(self) -> "Resolved":
        """Return the classes as they are now, for questions about many atoms."""
        roots = self.roots(np.arange(self._count))
        members = [(root, leaf) for root in self._factors for leaf in self.leaves(root)]
        product, leaf = np.array(members, np.int64).reshape(-1, 2).T
        return Resolved(roots, product, leaf)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Classes that change no more.

    Attributes:
      roots: int [atoms], the representative of every atom.
      product: int [pairs], roots that are products, once for each of their leaves.
      leaf: int [pairs], those leaves.
    """

    roots: Atoms
    product: Atoms
    leaf: Atoms

    def marks(self, atoms: Atoms) -> np.ndarray:
        """Return bool [atoms]: the leaves of the given atoms."""
        marked = np.zeros(len(self.roots), bool)
        marked[self.roots[atoms]] = True
        marked[self.leaf[marked[self.product]]] = True
        marked[self.product] = False
        return marked

    def spread(self, leaves: np.ndarray) -> np.ndarray:
        """Return bool [atoms]: those of which a leaf is marked in ``leaves``."""
        marked = leaves.copy()
        np.logical_or.at(marked, self.product, leaves[self.leaf])
        return marked[self.roots]

    def leaf_columns(self, atoms: Atoms) -> np.ndarray:
        """Return int [n, k]: the leaves of each atom.

        Atoms of fewer leaves than the most are filled up with -1.
        """
        roots = self.roots[atoms]
        order = np.argsort(self.product, kind="stable")
        first = np.searchsorted(self.product[order], roots)
        counts = np.searchsorted(self.product[order], roots, side="right") - first
        columns = np.full((len(atoms), max(1, counts.max(initial=0))), -1)
        columns[:, 0] = roots
        for slot in range(columns.shape[1]):
            some = counts > slot
            columns[some, slot] = self.leaf[order[first[some] + slot]]
        return columns

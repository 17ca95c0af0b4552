"""Site: one weight that is followed, or one part of it, and how its units lie in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dora_dynamics.decomposition import Axis

Kind = Literal["matrix", "vector", "embedding", "filters"]
Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Site:
    """One weight that is followed: a whole tensor, or the part of one that does one thing.

    What one unit is, with `axis="output"` and, behind the bar, with `axis="input"`:

    - `matrix` (a linear layer, GPT-2's Conv1D, an expert): an output feature | an input feature;
    - `embedding`: the vector of one token | one embedding dimension over all tokens, which is
      the unit PEFT's DoRA takes for embeddings;
    - `filters` (a convolution): the filter of one output channel, flattened | one tap of one
      input channel over all filters;
    - `vector` (a bias, the weight of a norm): the vector as a whole, its magnitude its norm |
      each entry.

    Attributes:
        name: clean path of the module (no wrapper of torch.compile or PEFT in it), followed by
            `.bias` and the like where the tensor is not its `weight`, `[3]` for one expert and
            `[query]` for a part of a fused weight.
        layer: number of its layer within its stack, None where the path has no number.
        stack: "encoder", "decoder", "vision", … as the path says; "" where it says nothing.
        role: what the weight does ("query", "value", …); where unknown the path, "*" for its
            numbers ("decoder.layers.*.mixing").
        stored_transposed: True where the module stores (in, out), as GPT-2's Conv1D does, and
            False where it stores (out, in), as `nn.Linear` does.
        kind: "matrix", "embedding", "filters" or "vector", as above.
        module: path of the module as this model has it.
        parameter: the module's name for the tensor.
        expert: which entry of a tensor that holds all experts of a layer, None otherwise.
        rows: half-open ranges of output features that belong to the site; None for all of them.
        head: attention head, where the site is one head.
        also_known_as: other names of this very site: of tied weights, and of a module that is used
            in several places.
    """

    name: str
    layer: int | None
    stack: str
    role: str
    stored_transposed: bool = False
    kind: Kind = "matrix"
    module: str = ""
    parameter: str = "weight"
    expert: int | None = None
    rows: Rows | None = None
    head: int | None = None
    also_known_as: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.module:
            object.__setattr__(self, "module", self.name)
        if self.rows is not None:  # lists, where the site was read from JSON
            ranges = tuple((int(start), int(stop)) for start, stop in self.rows)
            object.__setattr__(self, "rows", ranges)
        object.__setattr__(self, "also_known_as", tuple(self.also_known_as))

    @cached_property
    def tensor(self) -> str:
        """Name of the whole tensor: the same for all experts, parts and heads of one tensor."""
        return self.name.partition("[")[0]

    @property
    def key(self) -> str:
        """A name for this very site: its `name`, and its head behind a colon where it has one."""
        return self.name if self.head is None else f"{self.name}:{self.head}"

    def part(self, name: str) -> Site:
        """The site under the names of a part of it."""
        return replace(
            self,
            name=f"{self.name}[{name}]",
            also_known_as=tuple(f"{other}[{name}]" for other in self.also_known_as),
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """A view, in the orientation (out, in), of the matrix this site is or is a part of."""
        if self.expert is not None:
            weight = weight[self.expert]
        if self.kind == "vector":
            return weight.reshape(1, -1)
        if self.kind == "filters":
            return weight.flatten(1)
        return weight.T if self.stored_transposed else weight

    def extent(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the site in a tensor of this shape."""
        import torch

        rows, columns = self.oriented(torch.empty(tuple(shape), device="meta")).shape
        return rows, columns

    def units(self, shape: Sequence[int], axis: Axis) -> int:
        """How many units the site has in a tensor of this shape."""
        return self.extent(shape)[axis == "input"]

    def select(self, units: Tensor) -> Tensor:
        """The site's own entries of a tensor with one entry per output feature of the matrix.

        A view where the site is one range of rows, a copy where it is several.
        """
        if self.rows is None:
            return units
        if len(self.rows) == 1:
            start, stop = self.rows[0]
            return units[start:stop]
        import torch

        return torch.cat([units[start:stop] for start, stop in self.rows])

    def oriented(self, weight: Tensor) -> Tensor:
        """The site's own part of a weight as its module stores it, in the orientation (out, in)."""
        return weight if self._is_as_stored else self.select(self.matrix(weight))

    @cached_property
    def _is_as_stored(self) -> bool:
        """Whether the site is all of its tensor, which lies as it is read."""
        is_matrix = self.kind in ("matrix", "embedding") and not self.stored_transposed
        return is_matrix and self.rows is None and self.expert is None

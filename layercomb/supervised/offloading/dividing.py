"""An optimizer's state in parts: what belongs to each stack, to the rest, and to all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from layercomb import trees
from layercomb.trees import Tree


@dataclasses.dataclass(frozen=True)
class Part:
    """The optimizer's state for a part of the weights.

    Attributes:
      structure: of the state, with the rest of the weights left out.
      names: of its arrays, in order.
      own: those that no other part has.
    """

    structure: Any
    names: tuple[str, ...]
    own: tuple[str, ...]

    def state(self, arrays: Mapping[str, Any]) -> Any:
        """The state that these arrays make, by name."""
        return self.structure.unflatten([arrays[name] for name in self.names])


@dataclasses.dataclass(frozen=True)
class Divided:
    """The parts of an optimizer's state.

    Attributes:
      whole: the state of all weights.
      rest: what is outside of stacks; what all parts share is in it.
      stacks: path -> part.
      abstract: name -> `jax.ShapeDtypeStruct`, of all arrays.
    """

    whole: Part
    rest: Part
    stacks: dict[str, Part]
    abstract: dict[str, Any]

    @property
    def hosted(self) -> frozenset[str]:
        """The names of arrays that belong to stacks."""
        return frozenset(name for part in self.stacks.values() for name in part.own)


def divided(optimizer: Any, trainable: Tree, n_blocks: Mapping[str, int]) -> Divided:
    """The parts of an optimizer's state, from its `init`; nothing is computed.

    Args:
      optimizer: an `optax.GradientTransformation`.
      trainable: the weights that train, arrays or `jax.ShapeDtypeStruct`.
      n_blocks: of each stack, by path.

    Raises:
      ValueError: if an array of a stack's state is not stacked as its weights are.
    """

    def names_of(weights: Tree) -> tuple[Any, dict[str, Any]]:
        with jax.numpy_dtype_promotion('standard'):  # optax mixes dtypes
            state = jax.eval_shape(optimizer.init, weights)
        return jax.tree.structure(state), by_name(state)

    structure, abstract = names_of(trainable)
    rest_structure, of_rest = names_of(outside(trainable, n_blocks))
    parts = {}
    for path, n in n_blocks.items():
        its_structure, its = names_of(only(trainable, path))
        own = tuple(name for name in its if name not in of_rest)
        for name in own:
            shape = its[name].shape
            if not shape or shape[0] % n:
                raise ValueError(
                    f"offload='blocks': the optimizer keeps {name} {tuple(shape)}, which is not "
                    f'one part for each of the {n} blocks of {path!r}: choose another, such as '
                    'optimizers.adamw, or leave offload out'
                )
        parts[path] = Part(its_structure, tuple(its), own)
    whole = Part(structure, tuple(abstract), ())
    return Divided(whole, Part(rest_structure, tuple(of_rest), ()), parts, abstract)


def by_name(state: Any) -> dict[str, Any]:
    """The arrays of a state by their names, in order.

    Args:
      state: a tree.
    """
    return {
        jax.tree_util.keystr(keys, simple=True, separator='/'): x
        for keys, x in jax.tree_util.tree_leaves_with_path(state)
    }


def only(weights: Tree, stack: str) -> Tree:
    """Weights of one stack; None in the places of others.

    Args:
      weights: those of a model.
      stack: its path.
    """
    return trees.map_with_path(lambda path, x: x if is_inside(path, stack) else None, weights)


def outside(weights: Tree, stacks: Any) -> Tree:
    """Weights outside of stacks; None in the places of others.

    Args:
      weights: those of a model.
      stacks: paths.
    """

    def one(path: str, x: Any) -> Any:
        return None if any(is_inside(path, stack) for stack in stacks) else x

    return trees.map_with_path(one, weights)


def is_inside(path: str, stack: str) -> bool:
    """Whether a weight belongs to a stack.

    Args:
      path: of the weight.
      stack: the stack's.
    """
    return not stack or path.startswith(f'{stack}/')


def replaced(tree: Tree, path: str, value: Any) -> Any:
    """A nested dict with another value at a path.

    Args:
      tree: a nested dict that has the path.
      path: where; '' for the whole.
      value: what stands there.
    """
    if not path:
        return value
    key, _, rest = path.partition('/')
    return {**tree, key: replaced(tree[key], rest, value)}


def subtree(tree: Tree, path: str) -> Any:
    """What stands at a path, '' for the whole.

    Args:
      tree: a nested dict.
      path: where.
    """
    return trees.get(tree, path) if path else tree

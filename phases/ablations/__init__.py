"""Ablations of the phases: recipes and branches that differ from a phase, or from the one before it, by one idea.

A module here imports no phase of its own number, since `python -m phases.phase3` would then run that phase twice: the
phase passes itself as an argument. Names: `phase_<N-1>_with_X` is the previous phase plus X, `without_X` this phase
minus X, `with_X` this phase plus X.
"""

from dataclasses import replace

from mlx_transformer.train import Recipe


def take(recipe: Recipe, source: Recipe, *fields: str) -> Recipe:
    """Replace some fields of a recipe by those of another one."""
    return replace(recipe, **{name: getattr(source, name) for name in fields})

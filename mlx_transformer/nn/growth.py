"""Growth: weights for a larger model, made of those of a smaller one, for `--init-from`."""

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_transformer.nn.model import Model
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.text import plural
from mlx_transformer.utils.trees import by_path

Arrays = dict[str, mx.array]
Rule = Callable[
    [Arrays, Arrays, Path], str
]  # (the model's weights, those to change in place, their file) -> what it did

_LAYER = re.compile(r"blocks\.(\d+)\.")


def grow(model: Model, arrays: Arrays, path: Path) -> tuple[Arrays, list[str]]:
    """Return the weights in `path`, grown by each rule that the model needs, and a sentence for each rule.

    What still does not fit is left for `put_weights` to name. Raises BadInput as the rules do.
    """
    own, grown = by_path(model.parameters()), dict(arrays)
    notes = [rule(own, grown, path) for rule in RULES]
    return grown, [note for note in notes if note]


def stack_layers(own: Arrays, arrays: Arrays, path: Path) -> str:
    """Repeat the layers of a shallower model in order: layer i starts as layer i mod n of the n that there are.

    Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking", ICML, sec. 4: they double the layers; any
    multiple here. Raises BadInput for a depth that is no multiple.
    """
    depth, n = _depth(own), _depth(arrays)
    if not 0 < n < depth:
        return ""
    if depth % n:
        raise BadInput(
            f"'{path}' has {plural(n, 'layer')}, which cannot become {depth}: expected n_layers to be a multiple of {n}"
        )
    for name, value in list(arrays.items()):
        if match := _LAYER.match(name):
            for i in range(int(match[1]) + n, depth, n):
                arrays[f"blocks.{i}.{name[match.end() :]}"] = value
    return f"the {plural(n, 'layer')} of '{path}' are repeated in order, to {depth}"


def upcycle_experts(own: Arrays, arrays: Arrays, path: Path) -> str:
    """Start each expert as the feed-forward layer of its block; the router stays as it was drawn.

    Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055, sec. 3.1). All experts being equal, the model computes
    what its source does where the gates of a token sum to 1 and no token is dropped: in evaluation with
    MixtureOfExperts, not with Switch. Differs from the paper: every layer gets experts, and the optimizer starts anew.
    Raises BadInput for feed-forward layers with biases, which experts have not.
    """
    if not any(".ffn.experts." in name for name in own) or any(".ffn.experts." in name for name in arrays):
        return ""
    if any(re.fullmatch(r".*\.ffn\..*\.bias", name) for name in arrays):
        raise BadInput(
            f"'{path}' has biases in its feed-forward layers, which experts have not: give a run of phase 5 or 6"
        )
    dense = {name for name in arrays if ".ffn." in name}
    for name, value in own.items():
        source = name.replace(".ffn.experts.", ".ffn.")
        if source != name and source in dense:
            arrays[name] = mx.broadcast_to(arrays[source], (len(value), *arrays[source].shape))
        elif ".ffn." in name and name not in dense:
            arrays[name] = value
    used = {name.replace(".ffn.experts.", ".ffn.") for name in own if ".ffn.experts." in name}
    for name in dense & used:
        del arrays[name]
    return f"each expert starts as the feed-forward layer of its block in '{path}', with a new router"


RULES: tuple[Rule, ...] = (stack_layers, upcycle_experts)


def _depth(arrays: Arrays) -> int:
    return 1 + max((int(match[1]) for name in arrays if (match := _LAYER.match(name))), default=-1)

"""Which learning-rate scale and weight decay a parameter gets, from its name alone (layer-wise decay).

Source: `optim_factory.py` of the published Fast-iTPN code. Merges count as layers, so a model with depths
(1, 1, 12) has 16 of them: the stem is layer 0, block i layer i+1, heads and norms the layer after the last.
"""

from __future__ import annotations

from collections.abc import Sequence

_POSITIONS = ("pos_embed", "absolute_pos_embed", "cls_token", "mask_token", "gather_embed")


def num_layers(depths: Sequence[int]) -> int:
    """Entries of `blocks`: all blocks and the two merges."""
    return sum(depths) + 2


def layer_id(parameter_name: str, depths: Sequence[int]) -> int:
    """Layer of a parameter: 0 for stem and embeddings, i+1 for `blocks.i`, num_layers+1 for all else.

    A `backbone.` prefix (as in MaskedFeatureModel) is ignored.
    """
    name = parameter_name.removeprefix("backbone.")
    if name in _POSITIONS or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_layers(depths) + 1


def lr_scale(parameter_name: str, depths: Sequence[int], decay: float) -> float:
    """decay ** (layers above this one); 1 for the head."""
    return decay ** (num_layers(depths) + 1 - layer_id(parameter_name, depths))


def decays(parameter_name: str, ndim: int) -> bool:
    """Whether weight decay applies: not to vectors (biases, norms, layer scales) nor to embeddings."""
    name = parameter_name.removeprefix("backbone.")
    return ndim > 1 and not name.endswith(".bias") and name not in _POSITIONS

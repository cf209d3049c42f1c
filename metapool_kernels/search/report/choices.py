"""What a search has chosen, layer by layer, in rows and lines."""

from metapool_kernels.search.machine.console import format_table
from metapool_kernels.search.networks.architecture import Architecture

COLLAPSE = 0.6
"""Share of the layers without pooling from which on the user is warned."""

LAYER_COLUMNS = ("layer", "map", "choice", "probability", "margin", "epoch", "reason")


def layer_rows(architecture: Architecture) -> list[tuple[str, ...]]:
    """What was chosen in each layer, how clearly, when and why, under :data:`LAYER_COLUMNS`."""
    return [
        (
            layer.name,
            "x".join(map(str, layer.map_size)),
            " + ".join(
                name if weight == 1 else f"{weight:.2f} {name}"
                for name, weight in zip(layer.choice, layer.weights, strict=True)
            ),
            f"{layer.probability:.3f}",
            f"{layer.margin:.3f}",
            str(layer.epoch),
            layer.reason,
        )
        for layer in architecture.layers
    ]


def layer_table(architecture: Architecture) -> str:
    """One line per layer: :func:`layer_rows`, aligned."""
    return format_table(LAYER_COLUMNS, layer_rows(architecture))


def choice_warnings(architecture: Architecture) -> list[str]:
    """Whether the choices have collapsed to ``skip_connect``."""
    skipping = [layer for layer in architecture.layers if layer.choice[0] == "skip_connect"]
    if len(skipping) <= COLLAPSE * len(architecture.layers):
        return []
    return [
        f"{len(skipping)} of {len(architecture.layers)} layers chose skip_connect; "
        "the search may have collapsed, unless search.cost asked for that"
    ]

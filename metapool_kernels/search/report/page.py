"""The report of a run: one HTML file that needs nothing but itself."""

from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from metapool_kernels.search.networks.architecture import Architecture
from metapool_kernels.search.report.choices import LAYER_COLUMNS, choice_warnings, layer_rows
from metapool_kernels.search.report.gains import costs, gains, spread_note
from metapool_kernels.search.report.run_figures import in_order, network_name, spread_text
from metapool_kernels.search.run.controls import meaning
from metapool_kernels.search.run.results import Evaluation, NetworkResult, Results
from metapool_kernels.search.run.run_folder import (
    ALPHA,
    CONTROLS,
    COSTS,
    FRONT,
    HEAT_MAP,
    RECEPTIVE_FIELD,
    SEARCHED,
    STEP_TIME,
    TRAINING,
)
from metapool_kernels.search.settings.config import Config, CostConfig, SearchConfig, StopConfig

_SECTIONS = {
    FRONT: (
        "Accuracy against cost",
        "Costs are sums over the layers of the table, search.cost.file; bars are standard errors "
        "over the seeds. The line joins the networks that no other beats in both.",
    ),
    HEAT_MAP: (
        "Which pooling, and how clearly",
        "The softmax of each layer's alpha when the layer stopped. The table above holds the "
        "moving average of the same over the steps, which the stopping rule looks at.",
    ),
    ALPHA: (
        "How the choices came about",
        "The softmax of alpha at the start and after each epoch; thick: what was chosen.",
    ),
    COSTS: (
        "Expected cost",
        "The sum over the layers of p_j t_j at the end of each epoch, in times the network with "
        "skip_connect in every layer; layers that have stopped have the cost of what they keep.",
    ),
    RECEPTIVE_FIELD: (
        "Receptive field along depth",
        "The part of the image that the centre unit behind each layer can depend on, from the "
        "first to the last pixel, measured on the networks themselves, on enlarged images where "
        "these are small: beyond the dashed line a unit sees padding as well.",
    ),
    TRAINING: (
        "Loss and accuracy",
        "Means over the steps of each epoch, on training images. The weights are trained on one "
        "part of them, its half, and alpha on the rest.",
    ),
    STEP_TIME: (
        "Time of a step",
        "A layer that has stopped runs its choice alone, so steps should get shorter as layers "
        "stop.",
    ),
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.headline { font-size: 1.15rem; }
.warning { border-left: 4px solid #D55E00; background: #fdf1e9; padding: .5rem .8rem; }
.note { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; }
td:first-child { white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
figure { margin: .5rem 0 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
@page { margin: 14mm; }
@media print { body { font-size: 10pt; margin: 0; max-width: none; padding: 0; }
  h2 { break-after: avoid; } figure, tr, .warning { break-inside: avoid; }
  .scroll { overflow: visible; } img { max-height: 22cm; } }
"""


def report_page(results: Results, pictures: Mapping[str, bytes]) -> str:
    """The whole report as HTML, pictures included; no script, nothing from elsewhere.

    Args:
        results: what to report.
        pictures: PNG pictures by the names that this module gives them; those that are missing
            are left out.
    """
    architecture = results.architecture
    title = f"Pooling search on {architecture.backbone.name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="headline">{escape(headline(results))}</p>',
        _gains(results),
        _warnings(architecture),
        "<h2>Comparison with controls</h2>",
        _controls(results.evaluation, pictures),
        "<h2>Layers</h2>",
        _table(LAYER_COLUMNS, layer_rows(architecture)),
        *_sections(pictures),
        "<h2>Settings</h2>",
        _table(("setting", "value"), settings(results)),
        '<p class="note">All settings are in <code>config.yaml</code> of the run folder.</p>',
    ]
    return _page(title, parts)


def search_page(
    architecture: Architecture, search: SearchConfig, pictures: Mapping[str, bytes]
) -> str:
    """The report of a search in a training loop of which no more is known."""
    title = f"Pooling search on {architecture.backbone.name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="headline">{escape(choices(architecture))}</p>',
        _warnings(architecture),
        "<h2>Layers</h2>",
        _table(LAYER_COLUMNS, layer_rows(architecture)),
        *_sections(pictures),
        "<h2>Settings</h2>",
        _table(
            ("setting", "value"),
            [
                *_network(architecture),
                ("search", _search(search)),
                *_upper_level(search),
                *_origin(architecture),
            ],
        ),
    ]
    return _page(title, parts)


def _warnings(architecture: Architecture) -> str:
    return "".join(
        f'<p class="warning">Warning: {escape(text)}</p>' for text in choice_warnings(architecture)
    )


def _sections(pictures: Mapping[str, bytes]) -> list[str]:
    return [
        f"<h2>{heading}</h2>{_figure(pictures[name], heading, caption)}"
        for name, (heading, caption) in _SECTIONS.items()
        if name in pictures
    ]


def _page(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def headline(results: Results) -> str:
    """The result in one sentence."""
    evaluation = results.evaluation
    if evaluation is None or SEARCHED not in evaluation.networks:
        return choices(results.architecture)
    return (
        f"The network that was found names {_spread(evaluation.networks[SEARCHED])} of "
        f"{evaluation.images:,} held-out images correctly."
    )


def choices(architecture: Architecture) -> str:
    """What was chosen, in one sentence."""
    layers = architecture.layers
    first = Counter(layer.choice[0] for layer in layers)
    counts = ", ".join(f"{name} in {number}" for name, number in first.most_common())
    mixtures = sum(len(layer.choice) > 1 for layer in layers)
    beside = f" ({mixtures} with a second one beside it)" if mixtures else ""
    return f"Of {len(layers)} layers the search has chosen {counts}{beside}."


def _gains(results: Results) -> str:
    """What was gained over which control, and at what cost."""
    if results.evaluation is None:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>\n" for line in gains(results.evaluation))
    notes = f"{spread_note(results.evaluation)} {_start(results.evaluation)}".strip()
    chosen = choices(results.architecture)
    return (
        f"<ul>\n{lines}</ul>\n<p>{escape(costs(results))} {escape(chosen)}</p>\n"
        f'<p class="note">{escape(notes)}</p>'
    )


def _start(evaluation: Evaluation) -> str:
    searched = evaluation.networks.get(SEARCHED)
    if searched is None or searched.start == "scratch":
        return ""
    return (
        "The searched network began with the weights of the search, the others from scratch: it "
        "has had that much more training. "
    )


def _spread(result: NetworkResult) -> str:
    return spread_text(result.mean, result.std if len(result.seeds) > 1 else None)


def _controls(evaluation: Evaluation | None, pictures: Mapping[str, bytes]) -> str:
    if evaluation is None:
        return (
            "<p>Not measured yet: <code>metapool adapt</code> trains the network that was found "
            "and its controls, <code>metapool evaluate</code> measures them.</p>"
        )
    unit, rows = evaluation.cost, evaluation.rows
    table = _table(
        (
            *(
                "network",
                "start",
                "epochs",
                "parameters",
                *([f"cost ({unit.target})"] if unit else []),
            ),
            *("accuracy", "by seed", "mean loss", "what it shows"),
        ),
        [
            (
                network_name(kind),
                result.start,
                str(result.epochs),
                f"{result.parameters:,}",
                *([unit.text(result.cost)] if unit else []),
                _spread(result),
                "; ".join(
                    f"{seed}: {one.accuracy:.2f} % ({one.correct})"
                    for seed, one in result.seeds.items()
                ),
                f"{sum(one.loss for one in result.seeds.values()) / len(result.seeds):.4f}",
                meaning(kind),
            )
            for kind in in_order(rows)
            for result in (rows[kind],)
        ],
    )
    caption = (
        "Mean and standard deviation over the seeds; in brackets how many of the "
        f"{evaluation.images} images each network names correctly."
    )
    if CONTROLS not in pictures:
        return table
    return table + _figure(pictures[CONTROLS], "Accuracy of each network", caption)


def settings(results: Results) -> list[tuple[str, str]]:
    """The settings that a reader asks for first, and their values."""
    config, architecture = results.config, results.architecture
    return [
        *_network(architecture),
        ("data", " ".join(filter(None, (config.data.kind, config.data.name, config.data.root)))),
        ("precision", config.precision),
        ("batch size", f"{config.data.batch_size}, {config.data.accumulate} to a step"),
        ("search", _search(config.search)),
        ("weights", _weights(config)),
        *_upper_level(config.search),
        *_origin(architecture),
    ]


def _network(architecture: Architecture) -> list[tuple[str, str]]:
    backbone = architecture.backbone
    return [
        ("backbone", _with_arguments(architecture)),
        ("one image (C, H, W)", " x ".join(map(str, backbone.image_shape))),
        ("enhancers after", " ".join(filter(None, _after(architecture)))),
        ("candidates", ", ".join([*architecture.candidates, *architecture.extra_candidates])),
        ("padding counts in averages", "yes" if architecture.count_include_pad else "no"),
        ("each pooling is normalised", "yes" if architecture.candidate_norm else "no"),
    ]


def _upper_level(search: SearchConfig) -> list[tuple[str, str]]:
    alpha, stop = search.alpha, search.stop
    method = alpha.method + (
        f", {alpha.tasks} tasks, tilt {alpha.tilt:g}" if alpha.tilt else ", no tasks"
    )
    return [
        ("alpha", f"{method}, lr {alpha.lr:g}, weight decay {alpha.weight_decay:g}"),
        (
            "stop",
            f"{stop.rule}, {_threshold(stop)}, patience {stop.patience}, average {stop.ema:g}, "
            f"deadline {stop.deadline:.3g} of the epochs, then {stop.keep}",
        ),
        *_cost(search.cost),
    ]


def _origin(architecture: Architecture) -> list[tuple[str, str]]:
    return [
        ("seed", str(architecture.seed)),
        *((f"{name} version", version) for name, version in architecture.versions.items()),
    ]


def _cost(cost: CostConfig) -> list[tuple[str, str]]:
    if cost.file is None:
        return []
    budget = "no budget" if cost.budget is None else f"budget {cost.budget:g}"
    return [("cost", f"weight {cost.weight:g}, {budget}, from {cost.file}")]


def _after(architecture: Architecture) -> tuple[str, str | None]:
    return architecture.insert_after, architecture.insert_after_type


def _threshold(stop: StopConfig) -> str:
    return {
        "margin": f"delta {stop.delta:g}",
        "max_probability": f"probability {stop.probability:g}",
        "entropy": f"entropy {stop.entropy:g}",
        "stable_ranking": f"top {stop.top}",
        "perturbation": f"loss on {stop.batches} batches",
    }[stop.rule]


def _search(search: SearchConfig) -> str:
    open_to_the_end = "" if search.progressive else ", every layer open to the deadline"
    return f"at most {search.epochs} epochs, warm-up {search.warmup:g}{open_to_the_end}"


def _weights(config: Config) -> str:
    origin = f", begun with {config.model.weights}" if config.model.weights else ""
    if not config.search.train_weights:
        return f"not trained{origin}"
    weights = config.search.weights
    return f"{weights.optimizer}, lr {weights.lr:g}, weight decay {weights.weight_decay:g}{origin}"


def _with_arguments(architecture: Architecture) -> str:
    backbone = architecture.backbone
    arguments = ", ".join(f"{name}={value!r}" for name, value in backbone.arguments.items())
    dilation = "" if backbone.keep_dilation else "; every dilation set to 1"
    return f"{backbone.name}({arguments}){dilation}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead>{line(head, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _figure(picture: bytes, description: str, caption: str) -> str:
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    return (
        f'<figure><img src="{source}" alt="{escape(description)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )

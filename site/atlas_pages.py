"""The atlas on the site: an interactive chart of all methods, and a figure of each method's place among the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from lora_from_scratch.methods.method import Method
from lora_from_scratch.support import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "atlas.json"
SCRIPT = "atlas-chart.js"
PLACE = "atlas-chart"  # the id of the element that the chart is drawn in
REFERENCES = ("lora", "full")  # named in each figure beside the method

COSTS = {
    "trained": "trained parameters",
    "saved": "kept on disk, kB",
    "memory": "peak memory, MB",
    "work": "work of a training step, % of full fine-tuning",
    "tales": "perplexity of other tales (forgetting)",
}
QUALITIES = {"perplexity": "perplexity of the test cards", "bleu": "BLEU", "slots": "slot errors, %"}
LIMITS = {
    "trained": (10_000, 30_000, 100_000, 200_000, 500_000),
    "saved": (50, 200, 800, 2_000),
    "memory": (350, 375, 400, 425, 450),
    "perplexity": (1.45, 1.5, 1.75, 2.5, 5),
}
ANY = 1e12
# What the chart opens with: forgetting, in which good methods differ most; without the limit the others squeeze them.
OPENS_WITH = {"across": "tales", "limit_perplexity": 1.75}

# Vega-Embed draws the chart in the colours of the page, and again if the reader switches to the dark theme or back.
SNIPPET = """
const place = document.getElementById("%(place)s")
function draw() {
  const colour = name => getComputedStyle(document.body).getPropertyValue(name).trim()
  const text = colour("--color-foreground-primary"), line = colour("--color-background-border")
  const axis = {labelColor: text, titleColor: text, gridColor: line, domainColor: text, tickColor: text}
  const config = {background: "transparent", axis, mark: {color: text}, text: {color: text}, view: {stroke: line}}
  vegaEmbed(place, %(chart)s, {actions: false, renderer: "svg", config})
}
draw()
new MutationObserver(draw).observe(document.body, {attributes: true, attributeFilter: ["data-theme"]})
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw)
"""


def results() -> list[dict[str, Any]]:
    """The methods of the committed atlas."""
    methods: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["methods"]
    return methods


def rows() -> list[dict[str, Any]]:
    """What the chart shows of each method: means over the seeds, and the largest memory."""
    return [
        {
            "method": method["name"],
            "trained": method["trained_parameters"],
            "saved": round(method["saved_bytes"] / 1e3, 1),
            "memory": round(max(run["peak_memory_bytes"] for run in method["runs"]) / 1e6),
            "work": round(100 * method["step_work"], 1),
            "bleu": round(average(method, "bleu"), 1),
            "slots": round(100 * average(method, "slot_errors"), 1),
            "perplexity": round(average(method, "perplexity"), 2),
            "tales": round(average(method, "tale_perplexity")),
        }
        for method in results()
    ]


def average(method: Mapping[str, Any], what: str) -> float:
    return mean(run[what] for run in method["runs"])


# --- The interactive chart -----------------------------------------------------------------------------


def with_chart(page: str) -> str:
    """The page of the atlas with the chart in front of its first table."""
    mark = "\n| method "
    if mark not in page:
        raise ValueError("docs/atlas.md has no table any more in front of which the interactive chart can stand")
    chart = (
        "\nChoose what the axes show, and which methods: a method that exceeds a limit disappears. The chart opens "
        f"with the methods of a perplexity of at most {OPENS_WITH['limit_perplexity']}. Point at a dot to see all its "
        "numbers.\n\n"
        f'```{{raw}} html\n<div id="{PLACE}" role="figure" aria-label="A dot for each method that keeps to the chosen '
        "limits, with its cost on the horizontal axis and its quality on the vertical one. The table below has the "
        f'numbers."></div>\n<script defer src="../_static/{SCRIPT}"></script>\n```\n'
    )
    return page.replace(mark, chart + mark, 1)


def write_script(folder: Path) -> None:
    """Write the chart with all that it needs into one file: Vega-Lite, its data and its description."""
    import vl_convert

    script = vl_convert.javascript_bundle(SNIPPET % {"place": PLACE, "chart": chart().to_json(indent=None)})
    folder.mkdir(parents=True, exist_ok=True)
    # In a function, so that its names do not meet those of the theme's scripts.
    (folder / SCRIPT).write_text(f"(() => {{\n{script}\n}})()\n", encoding="utf-8")


def chart() -> Any:
    """Quality against a cost, both chosen from a list, of the methods that keep to the chosen limits."""
    import altair as alt

    def choice(name: str, label: str, options: Mapping[Any, str]) -> Any:
        bound = alt.binding_select(options=list(options), labels=list(options.values()), name=f"{label} ")
        return alt.param(name=name, value=OPENS_WITH.get(name, next(iter(options))), bind=bound)

    chosen = [
        choice("across", "Horizontal axis:", COSTS),
        choice("up", "Vertical axis:", QUALITIES),
        *(
            choice(f"limit_{name}", f"{first_upper((COSTS | QUALITIES)[name])}, at most:", with_any(limits))
            for name, limits in LIMITS.items()
        ),
    ]
    kept = " && ".join(f"datum.{name} <= limit_{name}" for name in LIMITS)
    across, up = (alt.Scale(type="log", nice=False, padding=pixels) for pixels in (60, 15))  # names stand to the right
    place = (
        alt.Chart(alt.Data(values=rows()))
        .add_params(*chosen)
        .transform_filter(kept)
        .transform_calculate(cost="datum[across]", quality="datum[up]")
        .encode(
            x=alt.X("cost:Q", scale=across, title=None, axis=alt.Axis(format="~s", tickCount=5)),
            y=alt.Y("quality:Q", scale=up, title=None, axis=alt.Axis(format="~g", tickCount=6, minExtent=35)),
            tooltip=["method:N", *(alt.Tooltip(f"{k}:Q", title=v) for k, v in (COSTS | QUALITIES).items())],
        )
    )
    names = alt.Chart().mark_text(align="left", dx=7, fontSize=11).encode(text="method:N")
    dots = alt.Chart().mark_circle(size=70, opacity=0.8, color=plotting.COLOURS[1])
    layers = alt.layer(dots, names, data=place.data).properties(width="container", height=420)
    for part in ("params", "transform", "encoding"):
        layers[part] = place[part]
    return layers


def first_upper(text: str) -> str:
    return text[0].upper() + text[1:]


def with_any(limits: tuple[float, ...]) -> dict[float, str]:
    return {ANY: "any"} | {limit: f"{limit:,}" for limit in limits}


# --- The place of one method ---------------------------------------------------------------------------


def place_in_atlas(cls: type[Method]) -> str:
    """The figure of a method's page, or nothing if the method is not in the atlas."""
    own = [row for row in rows() if row["method"] in cls.contestants()]
    if not own:
        return ""
    said = "; ".join(f"{r['method']}: {r['trained']:,}, {r['perplexity']:g} and {r['tales']:g}" for r in own)
    return (
        f"![Each method of the atlas is a dot. Left, the perplexity of the test cards against the trained parameters; "
        "right, against the perplexity of other tales, which rises when a model forgets. "
        f"{said}.](atlas-{cls.name}.png)\n\nThe page of [the atlas](../docs/atlas.md) has the numbers of all methods, "
        "and says how they were measured."
    )


def write_places(folder: Path, classes: Mapping[str, type[Method]]) -> None:
    """Draw the figure of every method that is in the atlas."""
    for name, cls in classes.items():
        own = [row["method"] for row in rows() if row["method"] in cls.contestants()]
        if own:
            figure, (left, right) = plotting.panels(2, width=4.2, height=3.2)
            plotting.label(left, x=COSTS["trained"], y=QUALITIES["perplexity"])
            plotting.label(right, x=COSTS["tales"])
            plotting.styled(draw_place)(left, "trained", own)
            plotting.styled(draw_place)(right, "tales", own)
            plotting.save(figure, folder / f"atlas-{name}.png")


def draw_place(axes: Axes, cost: str, own: list[str]) -> None:
    """Grey dots for all methods, names for `own` and the references, and a ring around `own`."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_yticks([1.5, 2, 4, 8, 16, 32], ["1.5", "2", "4", "8", "16", "32"])
    axes.minorticks_off()
    for row in rows():
        axes.scatter(row[cost], row["perplexity"], s=18, c="0.7")
    named = {row["method"]: (row[cost], row["perplexity"]) for row in rows() if row["method"] in (*own, *REFERENCES)}
    plotting.points(axes, named)
    for name in own:
        axes.scatter(*named[name], s=80, facecolors="none", edgecolors=plotting.COLOURS[1], linewidths=2)

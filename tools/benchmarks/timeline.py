"""Draws a simulated schedule: a row for each stage, a box for each pass, colored by kind.

Tests: tests/unit/tools/benchmarks/test_pipeline.py.
"""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = {"forward": "#4c78a8", "heads": "#f58518", "losses": "#e45756", "backward": "#72b7b2"}


@dataclass(frozen=True)
class Box:
    """A pass on a stage, with its start and end in seconds. `label` is a key of COLORS."""

    stage: int
    label: str
    start: float
    end: float


def draw(axes: Axes, boxes: list[Box], num_stages: int, title: str, end: float) -> None:
    """Draws stages from top to bottom and milliseconds from left to right, up to `end` seconds."""
    for label, color in COLORS.items():
        for stage in range(num_stages):
            stage_boxes = [box for box in boxes if (box.stage, box.label) == (stage, label)]
            spans = [(box.start * 1e3, (box.end - box.start) * 1e3) for box in stage_boxes]
            axes.broken_barh(spans, (stage - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.25)
    axes.set(xlim=(0, end * 1e3), ylim=(num_stages - 0.45, -0.55), ylabel="stage")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_yticks(range(num_stages))


def legend(figure: Figure, labels: set[str]) -> None:
    """Adds a legend with the labels that occur."""
    handles = [Patch(color=color, label=label) for label, color in COLORS.items() if label in labels]
    figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")

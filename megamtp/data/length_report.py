"""Draws the histogram of document lengths."""

import io

import numpy as np


def draw_lengths(lengths: np.ndarray) -> bytes:
    """Returns a PNG image of the histogram.

    Args:
        lengths: int64 [bins], the number of documents with 2**i to 2**(i+1) - 1 tokens.
    """
    from matplotlib.figure import Figure  # importing matplotlib takes longer than preparing a small corpus

    bins = np.flatnonzero(lengths)
    shown = np.arange(bins.min(), bins.max() + 1)
    figure = Figure(figsize=(7, 4), dpi=100)
    axes = figure.add_axes((0.13, 0.15, 0.85, 0.8))
    axes.bar(shown, lengths[shown], width=0.9, align="edge")
    ticks = range(int(shown[0]), int(shown[-1]) + 2, 1 + len(shown) // 9)
    axes.set_xticks(ticks, [f"{1 << power:,}" for power in ticks])
    axes.set(xlabel="tokens in a document", ylabel="documents")
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()

"""The histogram of document lengths has a bar for each power of two that occurs, and the image is deterministic."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from megamtp.data.length_report import draw_lengths


@pytest.mark.parametrize("counts", [{0: 3}, {1: 5, 4: 2}, {power: power + 1 for power in range(31)}])
def test_bars_have_the_heights_of_the_counts(counts):
    lengths = np.zeros(32, dtype=np.int64)
    lengths[list(counts)] = list(counts.values())
    png = draw_lengths(lengths)
    assert png == draw_lengths(lengths)
    image = imread(io.BytesIO(png))
    assert image.shape == (400, 700, 4)
    blue = np.abs(image[:, :, :3] - np.array([31, 119, 180]) / 255).max(-1) < 0.02  # matplotlib's first colour
    columns = blue.any(0)
    starts = np.flatnonzero(columns[1:] & ~columns[:-1])
    assert len(starts) == len(counts)
    heights = blue.sum(0)[starts + 3]
    tallest = max(counts.values())
    np.testing.assert_allclose(heights / heights.max(), [number / tallest for number in counts.values()], atol=0.02)

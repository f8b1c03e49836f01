"""The picture of documents' lengths: a bar for each power of two that occurs, and the same bytes every time."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from megamtp.data.length_report import draw_lengths


@pytest.mark.parametrize("counts", [{0: 3}, {1: 5, 4: 2}, {power: power + 1 for power in range(31)}])
def test_bars(counts):
    lengths = np.zeros(32, dtype=np.int64)
    lengths[list(counts)] = list(counts.values())
    content = draw_lengths(lengths)
    assert content == draw_lengths(lengths)
    image = imread(io.BytesIO(content))
    assert image.shape == (400, 700, 4)
    blue = np.abs(image[:, :, :3] - np.array([31, 119, 180]) / 255).max(-1) < 0.02  # matplotlib's first colour
    columns = blue.any(0)
    starts = np.flatnonzero(columns[1:] & ~columns[:-1])
    assert len(starts) == len(counts)
    heights = blue.sum(0)[starts + 3]
    tallest = max(counts.values())
    np.testing.assert_allclose(heights / heights.max(), [number / tallest for number in counts.values()], atol=0.02)

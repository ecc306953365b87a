"""The grids of InternVL's dynamic resolution."""

import importlib

import numpy as np
import pytest

from megamed.data.frames.tiles import tile_boxes, tile_grid

# The image processor without torchvision; InternVL's processor takes this one.
published = importlib.import_module("transformers.models.got_ocr2.image_processing_pil_got_ocr2")


@pytest.mark.parametrize("bounds", [(1, 12), (1, 6), (2, 12), (4, 9), (1, 1), (3, 3)])
def test_grids_are_those_of_transformers(bounds):
    rng = np.random.default_rng(1)
    sizes = [tuple(int(n) for n in rng.integers(1, 5000, 2)) for _ in range(1500)]
    # Shapes that lie exactly between grids, where the number of pixels decides.
    edges = (100, 224, 448, 600, 633, 634, 896, 1344, 3000)
    sizes += [(h * k, h * m) for h in edges for k in range(1, 5) for m in range(1, 5)]
    for height, width in sizes:
        wanted = published.get_optimal_tiled_canvas((height, width), (448, 448), *bounds)
        assert tile_grid(height, width, 448, *bounds) == wanted, (height, width)


def test_boxes_cover_the_picture_row_by_row():
    boxes = tile_boxes(100, 90, columns=3, rows=2)
    assert boxes[0] == (0, 0, 50, 30) and boxes[1] == (0, 30, 50, 30) and boxes[3] == (50, 0, 50, 30)
    assert len(boxes) == 6 and boxes[-1][0] + boxes[-1][2] == 100 and boxes[-1][1] + boxes[-1][3] == 90

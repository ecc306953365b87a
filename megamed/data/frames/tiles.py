"""Cutting a picture into square tiles that fit its shape: InternVL's dynamic resolution.

Chen et al., "How far are we to GPT-4V?", 2024, section 3.2: of all grids of tiles, the one whose shape is nearest to
the picture's; the picture is stretched to the grid, cut, and shown once more as a whole.
"""

from __future__ import annotations

from functools import lru_cache

Box = tuple[float, float, float, float]


@lru_cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Columns and rows of all grids, those with fewer tiles first and of as many the narrower first."""
    sizes = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sizes for rows in sizes if min_tiles <= columns * rows <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def tile_grid(height: int, width: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of the grid for a picture.

    Of grids whose shapes are as near, a larger one is taken if the picture has more than half of its pixels.

    Args:
        height, width: of the picture, pixels.
        tile: edge of a tile, pixels.
        min_tiles, max_tiles: bounds of the number of tiles.
    """
    shape, best, nearest = width / height, (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(shape - columns / rows)
        if distance < nearest or (distance == nearest and height * width > 0.5 * tile * tile * columns * rows):
            best, nearest = (columns, rows), distance
    return best


def tile_boxes(height: int, width: int, columns: int, rows: int) -> list[Box]:
    """Top, left, height and width of each tile, row by row."""
    high, wide = height / rows, width / columns
    return [(row * high, column * wide, high, wide) for row in range(rows) for column in range(columns)]

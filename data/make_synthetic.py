"""Draw a stand-in for PathMNIST, so that the programs can be tried without a download.

    python data/make_synthetic.py                     # writes synthetic.npz beside this script
    python data/make_synthetic.py --out /tmp/new.npz

The tiles are drawn by this script. They only need to look a little like the nine tissues, so
results on them say nothing about real tissue. The key `synthetic` marks the file as synthetic.
"""

import argparse
from pathlib import Path

import numpy as np

PER_CLASS = {
    "train": 100,
    "val": 20,
    "test": 40,
}
# Optical densities in red, green and blue of haematoxylin and of eosin, from Ruifrok & Johnston,
# Anal Quant Cytol Histol 23 (2001) 291-299.
DENSITIES = np.array(
    [
        [0.650, 0.704, 0.286],
        [0.072, 0.990, 0.105],
    ]
)


class Tile:
    """Draws random patterns for one tile. All patterns of a tile are turned and enlarged together.

    The size of a pattern is its length and its width in pixels, or one number for both.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        pixels = np.mgrid[-14:14, -14:14].T
        # The Q of a random matrix's QR decomposition is a random rotation or reflection.
        rotation, _ = np.linalg.qr(rng.normal(size=(2, 2)))
        self.position = rng.uniform(0.75, 1.1) * pixels @ rotation
        self.rng = rng

    def noise(self, *size: float) -> np.ndarray:
        """Return smooth noise with mean 0 and standard deviation 1: the sum of 50 random waves."""
        frequencies = self.rng.normal(size=(2, 50))
        phases = self.rng.uniform(0, 2 * np.pi, 50)
        waves = np.cos(self.position / size @ frequencies + phases)
        return waves.sum(axis=2) / 5

    def distances(self, *size: float) -> np.ndarray:
        """Return the distances of each pixel to 144 random points, the nearest point first.

        On average there is one point per rectangle of this size. If `size` has a length and a
        width, distances along the longer side count less, so points at equal distance form
        ellipses."""
        points = self.rng.uniform(-6, 6, (144, 1, 1, 2))
        offsets = self.position / size - points
        distances = min(size) * np.linalg.norm(offsets, axis=3)
        return np.sort(distances, axis=0)


def inside(depth: np.ndarray) -> np.ndarray:
    """Return 1 where a depth is positive and 0 where it is negative, with an edge of one pixel."""
    return np.clip(depth + 0.5, 0, 1)


def draw_stains(label: int, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Return the amounts of haematoxylin and of eosin, each (28, 28), from 0 (none) to about 1. The
    labels are PathMNIST's."""
    match label:
        case 0:  # adipose
            # Large empty fat cells. Their walls are where two points are about equally near.
            nearest, second, *_ = tile.distances(10)
            walls = inside(1 + nearest - second)
            return 0.3 * walls, 0.1 + 0.5 * walls
        case 1:  # background
            # Bare glass with a faint, slowly varying tint.
            tint = 0.12 + 0.02 * tile.noise(6)
            return tint, tint
        case 2:  # debris
            # Dead tissue: grains without any order.
            grains = tile.noise(1)
            return 0.3 - 0.1 * grains, 0.5 + 0.15 * grains
        case 3:  # lymphocytes
            # Small, dark, round nuclei that lie close together.
            nuclei = inside(1.6 - tile.distances(3.6)[0])
            return 0.2 + 0.8 * nuclei, 0.3 - 0.1 * nuclei
        case 4:  # mucus
            # Pale, bluish wisps.
            wisps = tile.noise(6, 1.8)
            return 0.22 + 0.06 * wisps, 0.15 + 0.04 * wisps
        case 5:  # smooth muscle
            # Straight parallel fibres with long nuclei between them.
            fibres = tile.noise(15, 1.5)
            nuclei = inside(1 - tile.distances(16, 7)[0])
            return 0.15 + 0.6 * nuclei, 0.6 + 0.1 * fibres
        case 6:  # normal colon mucosa
            # Round glands, which are rings of nuclei around a pale centre.
            nearest = tile.distances(11)[0]
            centres = inside(3.5 - nearest)
            rings = inside(5.5 - nearest) - centres
            return 0.2 + 0.6 * rings, 0.5 - 0.3 * centres
        case 7:  # cancer-associated stroma
            # Loose fibres with gaps between them, and short nuclei.
            gaps = inside(tile.noise(6, 2) - 1.2)
            nuclei = inside(1.2 - tile.distances(14, 7)[0])
            return 0.15 + 0.6 * nuclei, 0.6 - 0.4 * gaps
        case 8:  # colorectal adenocarcinoma epithelium
            # Large, crowded nuclei of irregular shape.
            nuclei = inside(3 * tile.noise(1.6))
            return 0.2 + 0.6 * nuclei, 0.4 + 0.1 * nuclei


def draw_tile(label: int, rng: np.random.Generator) -> np.ndarray:
    """Return one tile, uint8 (28, 28, 3). Its colours follow from the Beer-Lambert law.

    The strength of both stains varies from tile to tile, so that colour alone does not reveal the
    tissue."""
    stains = np.stack(draw_stains(label, Tile(rng)), axis=2)
    strengths = rng.uniform(0.5, 1.5, 2)
    light = 245 * np.exp(-strengths * stains @ DENSITIES)
    return np.clip(light, 0, 255).astype(np.uint8)


def main() -> None:
    """Draw the three splits and write them into one npz file."""
    default = Path(__file__).with_name("synthetic.npz")
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    rng = np.random.default_rng(0)
    arrays = {"synthetic": np.uint8(1)}
    for split, per_class in PER_CLASS.items():
        labels = np.arange(9 * per_class) % 9
        images = [draw_tile(label, rng) for label in labels]
        arrays[f"{split}_images"] = np.stack(images)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    main()

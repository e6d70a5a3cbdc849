"""Draw a stand-in for PathMNIST, to try the programs offline: nine tissues in H&E colours.

    python data/make_synthetic.py                             # the sample beside this file
    python data/make_synthetic.py --full --out pathmnist.npz  # as many images as PathMNIST has
    python data/make_synthetic.py --train 20 --val 5 --test 5 --seed 1 --out tiny.npz

It is drawn, not tissue, and no source of results; the key `synthetic` in the file says so. As in
PathMNIST, a split has its own slides, each stained a little differently, and the test slides come
from a second centre, whose stain and scanner differ.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "val", "test")
PER_CLASS = (100, 20, 40)
FULL = (89_996, 10_004, 7_180)  # MedMNIST v2, doi:10.1038/s41597-022-01721-8
SLIDES = (40, 12, 16)
SIZES = (28, 64, 128, 224)
CHUNK = 256  # images of 28 px drawn at once, with a seed of their own; fewer if they are larger
LATTICE = 32  # random values a side, a power of 2; textures repeat after that many cells
# Optical density of haematoxylin and eosin in red, green and blue: Ruifrok & Johnston, Anal Quant
# Cytol Histol 23 (2001) 291-299.
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
# Added to them at the second centre: haematoxylin takes less red and
# more blue light, eosin less green.
CENTRE_SHIFT = np.array([[-0.10, 0.05, 0.10], [0.08, -0.12, 0.06]])

# Floats (n, size, size), one a pixel; (n, 1, 1), one an image; or one for all images.
Map = np.ndarray | float
Ink = tuple[Map, Map]  # amounts of haematoxylin and eosin, 0 (none) to about 1.5


@dataclass(frozen=True)
class Brush:
    """Draws random maps for `n` images of `size` pixels a side; lengths are in 1/28 of a side."""

    rng: np.random.Generator
    n: int
    size: int = 28

    def pick(self, low: float, high: float) -> Map:
        """Return one uniform value for each image, (n, 1, 1)."""
        return self.rng.uniform(low, high, (self.n, 1, 1)).astype(np.float32)

    def angle(self) -> Map:
        """Return one direction for each image, in radians."""
        return self.pick(0, 2 * np.pi)

    def frame(self, spacing: Map, stretch: Map = 1, angle: Map | None = None) -> tuple[Map, Map]:
        """Return coordinates in lattice cells: cells `spacing` high, `stretch` times as long."""
        angle = self.angle() if angle is None else angle
        side = ((np.arange(self.size, dtype=np.float32) + 0.5) / self.size - 0.5) * 28
        x, y = side[None, None, :], side[None, :, None]
        u = (np.cos(angle) * x + np.sin(angle) * y) / (spacing * stretch)
        v = (np.cos(angle) * y - np.sin(angle) * x) / spacing
        return u + self.pick(0, LATTICE), v + self.pick(0, LATTICE)

    def noise(self, u: Map, v: Map) -> Map:
        """Return smooth value noise, -1 to 1, of one lattice cell's grain."""
        table = self.rng.uniform(-1, 1, (self.n, LATTICE, LATTICE)).astype(np.float32)
        i, j, first, s, t = _lattice_cell(u, v)
        s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
        near, far = (
            (1 - s) * table.take(_wrap(i, row, first)) + s * table.take(_wrap(i + 1, row, first))
            for row in (j, j + 1)
        )
        return (1 - t) * near + t * far

    def bent_frame(self, spacing: Map, stretch: Map) -> tuple[Map, Map]:
        """Return the coordinates of a frame whose lines are not quite straight."""
        u, v = self.frame(spacing, stretch)
        u = u + 0.15 * self.noise(*self.frame(self.pick(6, 10)))
        return u, v + 0.15 * self.noise(*self.frame(self.pick(6, 10)))

    def cells(self, u: Map, v: Map, jitter: float = 0.9) -> tuple[Map, Map, Map]:
        """Return the distances to the nearest and second seed, and the nearest's random 0 to 1.

        There is one seed in each lattice cell, so many per image: cellular noise, Worley,
        SIGGRAPH 1996, doi:10.1145/237170.237267.
        """
        shape = (3, self.n, LATTICE, LATTICE)
        seed_u, seed_v, name = self.rng.uniform(0, 1, shape).astype(np.float32)
        i, j, first, s, t = _lattice_cell(u, v)
        nearest, second, which = np.full_like(u, 9), np.full_like(u, 9), np.zeros_like(u)
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                k = _wrap(i + di, j + dj, first)
                du = di + 0.5 + jitter * (seed_u.take(k) - 0.5) - s
                dv = dj + 0.5 + jitter * (seed_v.take(k) - 0.5) - t
                distance = np.sqrt(du * du + dv * dv)
                which = np.where(distance < nearest, name.take(k), which)
                second = np.minimum(second, np.maximum(nearest, distance))
                nearest = np.minimum(nearest, distance)
        return nearest, second, which

    def patches(self, spacing: float, level: Map, edge: float = 0.15) -> Map:
        """Return blobs, 1 inside and 0 outside; the higher `level` (-1 to 1), the fewer."""
        u, v = self.frame(self.pick(0.8, 1.25) * spacing)
        rough = 0.7 * self.noise(u, v) + 0.3 * self.noise(2.3 * u, 2.3 * v)
        return _step(rough - level, edge)

    def fibres(self, spacing: Map, stretch: float, angle: Map, wave: Map) -> Map:
        """Return streaks, -1 to 1, along `angle`; `wave` bends them, in units of `spacing`."""
        u, v = self.frame(spacing, stretch, angle)
        v = v + wave * self.noise(*self.frame(self.pick(7, 11)))
        return 0.65 * self.noise(u, v) + 0.35 * self.noise(2 * u, 2 * v)

    def nuclei(
        self, spacing: Map, radius: Map, keep: Map, stretch: Map = 1, angle: Map | None = None
    ) -> Map:
        """Return nuclei, 0 to 1: a share `keep` of seeds, `radius` in units of `spacing`."""
        distance, _, name = self.cells(*self.frame(spacing, stretch, angle))
        kind = (name * 37) % 1  # size and darkness differ from nucleus to nucleus
        shape = _step((radius * (0.75 + 0.5 * kind) - distance) * spacing, 1.2)
        return shape * (name < keep) * (1.1 - 0.4 * kind)


def _lattice_cell(u: Map, v: Map) -> tuple[Map, Map, Map, Map, Map]:
    """Return each pixel's column and row, its image's first table entry, its place in the cell."""
    column, row = np.floor(u), np.floor(v)
    first = np.arange(len(u), dtype=np.int32)[:, None, None] * LATTICE**2
    return column.astype(np.int32), row.astype(np.int32), first, u - column, v - row


def _wrap(i: Map, j: Map, first: Map) -> Map:
    """Return flat indices into the tables, which repeat: `& (2**k - 1)` is a fast `% 2**k`."""
    return first + (j & (LATTICE - 1)) * LATTICE + (i & (LATTICE - 1))


def _step(value: Map, width: float) -> Map:
    """Return 0 below zero and 1 above, with a ramp of `width` that keeps edges from aliasing."""
    return np.clip(value / width + 0.5, 0, 1)


def adipose(b: Brush) -> Ink:
    """Large empty fat cells; thin walls, a few nuclei in them."""
    spacing = b.pick(9, 16)
    nearest, second, _ = b.cells(*b.bent_frame(spacing, b.pick(1, 1.4)))
    wall = _step(b.pick(0.5, 1.6) - (second - nearest) * spacing, 1.5)
    h = wall * (b.pick(0.08, 0.3) + 0.9 * b.patches(3, 0.45))
    return h, wall * b.pick(0.25, 0.6) + b.pick(0.02, 0.1)


def background(b: Brush) -> Ink:
    """Bare glass with a faint tint, and seldom a speck of dust."""
    tint = 1 + 0.25 * b.noise(*b.frame(b.pick(8, 20)))
    dust = b.nuclei(b.pick(5, 9), 0.12, b.pick(-0.1, 0.15))
    return tint * b.pick(0.0, 0.2) + 0.5 * dust, tint * b.pick(0.02, 0.25)


def debris(b: Brush) -> Ink:
    """Dead tissue: pink grains, smeared remains of nuclei, cracks."""
    grain = b.noise(*b.frame(b.pick(1.1, 1.7))) + 0.6 * b.noise(*b.frame(b.pick(2.2, 4)))
    crack = b.patches(4, b.pick(0.35, 0.8))
    e = (b.pick(0.35, 0.7) + b.pick(0.1, 0.22) * grain) * (1 - 0.8 * crack)
    dust = b.nuclei(b.pick(2.0, 3.0), 0.3, b.pick(0.1, 0.5))
    h = b.pick(0.05, 0.35) * (1 + 0.4 * grain) + b.pick(0.15, 0.4) * dust
    return h * (1 - 0.7 * crack), e


def lymphocytes(b: Brush) -> Ink:
    """Small dark round nuclei, packed, with little between them."""
    dots = b.nuclei(b.pick(2.1, 2.9), b.pick(0.42, 0.52), b.pick(0.8, 1.1))
    gap = b.patches(5, b.pick(0.3, 0.8))
    h = b.pick(0.08, 0.2) + b.pick(0.6, 0.95) * dots * (1 - 0.8 * gap)
    return h, b.pick(0.1, 0.4) * (1 - 0.6 * gap)


def mucus(b: Brush) -> Ink:
    """Pale bluish pools with wisps; few cells float in them."""
    wisp = b.fibres(b.pick(3.5, 6), 3, b.angle(), b.pick(1.0, 2.2))
    wisp = np.maximum(1 - 3 * np.abs(wisp), 0) * (0.6 + 0.4 * b.noise(*b.frame(b.pick(5, 9))))
    cloud = 1 + 0.5 * b.noise(*b.frame(b.pick(6, 12)))
    float_cells = b.nuclei(b.pick(5, 8), 0.2, b.pick(-0.2, 0.3))
    h = cloud * b.pick(0.08, 0.3) + wisp * b.pick(0.12, 0.35) + 0.5 * float_cells
    return h, cloud * b.pick(0.04, 0.25) + wisp * b.pick(0.05, 0.25)


def smooth_muscle(b: Brush) -> Ink:
    """Dense parallel fibres; long thin nuclei lie along them."""
    angle = b.angle()
    streak = b.fibres(b.pick(1.5, 2.6), 9, angle, b.pick(0.0, 0.5))
    rods = b.nuclei(b.pick(2.2, 3.0), 0.24, b.pick(0.1, 0.35), b.pick(2.2, 3.2), angle)
    cleft = _step(-0.5 - b.fibres(b.pick(2, 4), 8, angle, 0.4) + b.pick(-0.4, 0.1), 0.2)
    e = (b.pick(0.45, 0.75) + b.pick(0.12, 0.25) * streak) * (1 - 0.8 * cleft)
    return (b.pick(0.08, 0.25) + b.pick(0.35, 0.7) * rods) * (1 - 0.7 * cleft), e


def normal_mucosa(b: Brush) -> Ink:
    """Round glands: a ring of nuclei, goblet cells inside, a pale lumen; loose cells between."""
    spacing = b.pick(11, 19)
    distance, _, _ = b.cells(*b.bent_frame(spacing, b.pick(1, 1.4)), jitter=0.5)
    depth = (b.pick(0.38, 0.48) - distance) * spacing  # inwards from the gland's edge
    ring = _step(depth, 1) * _step(b.pick(1.2, 2.2) - depth, 1)
    inside = _step(depth - 1.6, 1)
    lumen = _step(depth - b.pick(3.5, 5), 1)
    goblet, second, _ = b.cells(*b.frame(b.pick(2.2, 3.2)))
    septa = inside * (1 - lumen) * _step(0.25 - (second - goblet), 0.3)
    dots = b.nuclei(b.pick(2.3, 3.0), 0.4, b.pick(0.25, 0.7)) * _step(-depth, 1)
    h = 0.12 + ring * b.pick(0.4, 0.8) + 0.2 * septa + b.pick(0.4, 0.7) * dots - 0.06 * lumen
    e = b.pick(0.25, 0.55) * (1 - b.patches(4, 0.3)) * (1 - inside)
    return h, e + 0.3 * ring + inside * b.pick(0.06, 0.2) + 0.2 * septa


def stroma(b: Brush) -> Ink:
    """Loose wavy fibres with gaps, and scattered spindle nuclei."""
    angle = b.angle()
    streak = b.fibres(b.pick(1.8, 3.0), 4, angle, b.pick(1.5, 2.6))
    loose = b.fibres(b.pick(2.2, 3.5), 3, angle, b.pick(1.5, 2.6))
    gap = _step(loose - b.pick(0.1, 0.5), 0.25)
    spindles = b.nuclei(b.pick(2.6, 3.6), 0.27, b.pick(0.15, 0.5), b.pick(1.2, 2.0))
    e = (b.pick(0.35, 0.65) + b.pick(0.15, 0.3) * streak) * (1 - b.pick(0.4, 0.8) * gap)
    return b.pick(0.08, 0.25) + b.pick(0.35, 0.75) * spindles, e


def adenocarcinoma(b: Brush) -> Ink:
    """Crowded large irregular nuclei, torn lumina, strands of stroma."""
    spacing = b.pick(2.9, 4.2)
    shape = b.pick(0.38, 0.5) * (1 + 0.4 * b.noise(*b.frame(b.pick(1.5, 2.5))))
    crowd = b.nuclei(spacing, shape, b.pick(0.8, 1.1), b.pick(1.0, 1.5))
    lumen = b.patches(7, b.pick(0.3, 0.9), 0.08)
    strand = b.patches(6, b.pick(0.25, 0.7)) * (1 - lumen)
    h = (b.pick(0.2, 0.4) + b.pick(0.3, 0.6) * crowd) * (1 - 0.7 * strand)
    return h * (1 - lumen), (b.pick(0.3, 0.55) + 0.2 * strand) * (1 - 0.9 * lumen)


# In the order of PathMNIST's labels; the second is a tissue that may reach into the tile.
TISSUES: tuple[tuple[Callable[[Brush], Ink], Callable[[Brush], Ink]], ...] = (
    (adipose, stroma),
    (background, mucus),
    (debris, mucus),
    (lymphocytes, adenocarcinoma),
    (mucus, debris),
    (smooth_muscle, stroma),
    (normal_mucosa, adenocarcinoma),
    (stroma, smooth_muscle),
    (adenocarcinoma, normal_mucosa),
)


def draw_chunk(job: tuple[int, int, int, int, int, int]) -> np.ndarray:
    """Draw images of one class for one split.

    Parameters
    ----------
    job : (seed, split, label, chunk, n, size)
        The first four alone decide the random numbers, whichever process draws them.

    Returns
    -------
    numpy.ndarray
        uint8 (n, size, size, 3).
    """
    seed, split, label, chunk, n, size = job
    rng = np.random.default_rng([seed, split, label, chunk])
    brush = Brush(rng, n, size)
    own, other = TISSUES[label]
    h, e = own(brush)
    mixed = brush.pick(0, 1) < 0.25  # a pathologist's tile is seldom pure
    share = mixed * brush.patches(12, brush.pick(0.2, 0.6), 0.3)
    h_other, e_other = other(brush)
    h, e = h + share * (h_other - h), e + share * (e_other - e)
    return develop(rng, np.stack([h, e], axis=-1), seed, split)


def draw_slides(seed: int, split: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a split's stains (slides, 2, 3) in optical density, white light and blur."""
    rng = np.random.default_rng([seed, split, len(TISSUES)])  # no class's stream
    n, second_centre = SLIDES[split], SPLITS[split] == "test"
    stains = STAINS + rng.normal(0, 0.05, (n, 2, 3))
    if second_centre:
        stains = stains + CENTRE_SHIFT
    strength = rng.uniform([[0.75], [0.65]], [[1.25], [1.05]], (n, 2, 1))  # of the two dyes
    strength = strength * (1.17 if second_centre else 1.0)
    white = rng.uniform(225, 248, (n, 1)) + rng.normal(0, 3, (n, 3))
    blur = 0.4 if second_centre else 0.25
    return (stains * strength).astype(np.float32), white.astype(np.float32), blur


def develop(rng: np.random.Generator, ink: np.ndarray, seed: int, split: int) -> np.ndarray:
    """Turn ink (n, size, size, 2) into uint8 RGB by Beer-Lambert's law: white * exp(-density)."""
    stains, white, blur = draw_slides(seed, split)
    slide = rng.integers(len(stains), size=len(ink))
    density = np.maximum(ink, 0) @ stains[slide][:, None]
    light = white[slide][:, None, None] * np.exp(-density)
    for _ in range(2):  # the scanner's optics: a weighted mean with both neighbours, each way
        wide = np.pad(light, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
        light = (1 - blur) * light + blur / 2 * (wide[:, :-2] + wide[:, 2:])
        light = light.swapaxes(1, 2)
    light += rng.normal(0, 3, light.shape)
    return np.clip(light + 0.5, 0, 255).astype(np.uint8)


def draw_split(seed: int, split: int, total: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return shuffled images, uint8 (total, size, size, 3), and labels, uint8 (total, 1)."""
    jobs, at_once = [], max(1, CHUNK * 28**2 // size**2)
    for label in range(len(TISSUES)):
        n = total // len(TISSUES) + (label < total % len(TISSUES))
        for chunk, start in enumerate(range(0, n, at_once)):
            jobs.append((seed, split, label, chunk, min(at_once, n - start), size))
    place = np.random.default_rng([seed, split, len(TISSUES) + 1]).permutation(total)
    images = np.empty((total, size, size, 3), np.uint8)
    labels = np.empty((total, 1), np.uint8)
    done = 0
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with ProcessPoolExecutor(initializer=signal.signal, initargs=ignore) as pool:
        for job, chunk in zip(jobs, pool.map(draw_chunk, jobs), strict=True):
            rows = place[done : done + len(chunk)]
            images[rows], labels[rows] = chunk, job[2]
            done += len(chunk)
    return images, labels


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the npz under a temporary name in the same folder, then rename it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def whole_number(text: str) -> int:
    """Parse a number that may not be negative."""
    if (n := int(text)) < 0:
        raise ValueError(text)
    return n


def parse_args() -> tuple[argparse.Namespace, list[int]]:
    """Return the flags and the number of images of each split; exit with 2 on a wrong flag."""
    parser = argparse.ArgumentParser(description="Draw synthetic tissue in PathMNIST's format.")
    out = Path(__file__).with_name("synthetic.npz")
    parser.add_argument("--out", type=Path, default=out, help=f"default: {out.name} beside this")
    for split, n in zip(SPLITS, PER_CLASS, strict=True):
        text = f"{split} images of each class (default: {n})"
        parser.add_argument(f"--{split}", type=whole_number, metavar="N", help=text)
    parser.add_argument("--full", action="store_true", help=f"draw {FULL} images, all in all")
    parser.add_argument("--seed", type=whole_number, default=0, help="default: 0")
    parser.add_argument("--size", type=int, choices=SIZES, default=28, help="pixels a side")
    args = parser.parse_args()
    given = [vars(args)[split] for split in SPLITS]
    if args.full and given != [None] * 3:
        parser.error("--full sets the counts; leave out --train, --val and --test")
    if 0 in given:
        parser.error("--train, --val and --test: at least 1 image of each class")
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        parser.error(f"--out {args.out}: give a file in a folder that can be written")
    counts = [len(TISSUES) * (n or m) for n, m in zip(given, PER_CLASS, strict=True)]
    return args, list(FULL) if args.full else counts


def main() -> None:
    """Run the command line."""
    args, counts = parse_args()
    arrays = {"synthetic": np.array(1, np.uint8)}
    for i, (split, total) in enumerate(zip(SPLITS, counts, strict=True)):
        images, labels = draw_split(args.seed, i, total, args.size)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    save(args.out, arrays)
    told = ", ".join(f"{n} {split}" for n, split in zip(counts, SPLITS, strict=True))
    print(f"{args.out}: {told} synthetic images of {args.size} x {args.size} pixels")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

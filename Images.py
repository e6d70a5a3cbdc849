"""Reading images: whatever Pillow opens, as RGB of 8 bits.

tile = to_rgb(open_image(Path("tile.png")))
"""

import warnings
from pathlib import Path

from PIL import Image

MAX_PIXELS = 89_478_485  # Pillow's own limit, against files that fill the memory


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image without decoding it yet. Raises an exception, mostly Pillow's, if the file is
    not an image, has more than `max_pixels`, several pages, or more than 8 bits."""
    if path.exists() and not path.is_file():  # opening a pipe would wait forever
        raise ValueError("not a regular file")
    Image.MAX_IMAGE_PIXELS = max_pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example about damaged EXIF data
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path)
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise ValueError(f"has {pages} pages or frames; save each image as its own file")
    if image.mode.startswith(("I", "F")):
        raise ValueError("more than 8 bits per channel; convert it to 8 bits")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB. Transparent pixels become white, like an empty slide."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

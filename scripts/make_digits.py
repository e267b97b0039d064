"""Write scikit-learn's handwritten digits (1,797 real images, 8 x 8) as a class-folder tree of PNG files.

Every fifth image goes to ``val/``, the others to ``train/``.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.surroundings import a_path

VAL_EVERY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=a_path, help="where to write train/ and val/")
    folder = parser.parse_args().folder
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("val" if i % VAL_EVERY == 0 else "train") / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(path)
    print(f"{len(digits.images):,} images in {folder}")


if __name__ == "__main__":
    main()

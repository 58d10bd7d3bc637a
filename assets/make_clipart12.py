"""Pack clipart-12: twelve classes of Open Clip Art Library images as one ImageFolder tar.

The source is the Debian package ``openclipart-png`` (public domain), which sorts about 8,000 PNGs
into topic folders.  A class here is a list of those folders.  Run from the repository root:

    apt-get install openclipart-png
    python assets/make_clipart12.py --out assets/clipart-12.tar

The library holds many copies and near copies of the same drawing (coloured and black-and-white, large
and small, ``_01`` and ``_02``).  Images that look alike are grouped, and a group goes to one split
only, so the validation figure is not a memory test.  The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import re
import tarfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

SIZE = 96
MAX_PIXELS = 50_000_000
LIBRARY = Path("/usr/share/openclipart/png")
Image.MAX_IMAGE_PIXELS = None  # sizes are checked from the header in `decode`


def decode(path: Path) -> np.ndarray | None:
    """Return the PNG as a (SIZE, SIZE, 3) uint8 array, or None where it cannot be used.

    Transparency is laid over white, empty margins are cut, and the drawing is centred in a white square.
    Skipped: unreadable files, files above MAX_PIXELS, and drawings with nothing but white in them.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError):
        return None
    flat = Image.new("RGBA", image.size, "white")
    flat.alpha_composite(image)
    flat = flat.convert("RGB")
    ink = ImageChops.difference(flat, Image.new("RGB", flat.size, "white"))
    box = ink.point(lambda value: 255 * (value > 8)).getbbox()
    if box is None:
        return None
    flat = flat.crop(box)
    inner = SIZE - 4
    scale = inner / max(flat.size)
    size = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    flat = flat.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(flat, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return np.asarray(square)


def load_library(root: Path, cache: Path | None = None) -> tuple[list[str], np.ndarray]:
    """Decode every PNG below root; return the relative names (sorted) and an (N, SIZE, SIZE, 3) array."""
    if cache is not None and cache.exists():
        stored = np.load(cache)
        return stored["names"].tolist(), stored["images"]
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    with ProcessPoolExecutor() as pool:
        decoded = list(pool.map(decode, [root / name for name in names], chunksize=16))
    kept = [(name, image) for name, image in zip(names, decoded, strict=True) if image is not None]
    names, images = [name for name, _ in kept], np.stack([image for _, image in kept])
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, names=np.array(names), images=images)
    return names, images


# What a class is made of: beginnings of relative file names, or "folder/*" for the files right in a folder.
CLASSES: dict[str, list[str]] = {
    "animals": ["animals/"],
    "arrows": ["shapes/arrows/"],
    "computers": ["computer/*", "computer/hardware/", "electronics/"],
    "flags": ["signs_and_symbols/flags/"],
    "food": ["food/"],
    "icons": ["computer/icons/lemon-theme/"],
    "office": ["office/", "education/"],
    "people": ["people/*", "people/stickmen/"],
    "plants": ["plants/", "signs_and_symbols/map_symbols/tree"],
    "signs": [
        "signs_and_symbols/map_symbols/aiga",
        "transportation/aiga-symbols/",
        "transportation/roadsigns/",
    ],
    "tools": ["tools/"],
    "vehicles": ["transportation/*", "transportation/vehicles/", "transportation/boating/"],
}


def class_of(name: str) -> str | None:
    """Return the class this relative file name belongs to, if any."""
    folder = name.rsplit("/", 1)[0] + "/*"
    for label, beginnings in CLASSES.items():
        if any(folder == start or name.startswith(start) for start in beginnings):
            return label
    return None


def group_alike(names: list[str], images: np.ndarray, alike: float = 0.95) -> np.ndarray:
    """Give every image a group number; images in one group look alike or are one numbered series.

    Two images are linked when the correlation of their 16x16 colour thumbnails is above `alike`, or when
    they lie in one folder and their names differ only in a number, "bw" or "md" at the end.
    """
    cell = SIZE // 16
    thumbs = images.reshape(-1, 16, cell, 16, cell, 3).mean((2, 4), dtype=np.float32).reshape(len(images), -1)
    thumbs -= thumbs.mean(1, keepdims=True)
    thumbs /= np.linalg.norm(thumbs, axis=1, keepdims=True) + 1e-3
    parent = list(range(len(names)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for start in range(0, len(names), 512):
        for row, column in np.argwhere(thumbs[start : start + 512] @ thumbs.T > alike).tolist():
            parent[find(start + row)] = find(column)
    first_of: dict[str, int] = {}
    for index, name in enumerate(names):
        series = re.sub(r"([\d_.\-]|bw|md)*\.png$", "", name)
        parent[find(index)] = find(first_of.setdefault(series, index))
    return np.array([find(index) for index in range(len(names))])


def choose(
    names: list[str],
    images: np.ndarray,
    groups: np.ndarray,
    cap: int = 280,
    val_share: float = 0.2,
    seed: int = 0,
) -> dict[tuple[str, str], list[int]]:
    """Pick at most `cap` images a class and split each class by group; return (split, class) -> indices.

    Of pixel-identical copies one stays: the one in the deepest folder, as the most specific.  Groups
    larger than a twentieth of the class go to train.
    """
    best: dict[str, int] = {}
    for index in sorted(range(len(names)), key=lambda i: (-names[i].count("/"), names[i])):
        best.setdefault(hashlib.sha256(images[index].tobytes()).hexdigest(), index)
    members: dict[str, list[int]] = defaultdict(list)
    for index in sorted(best.values()):
        label = class_of(names[index])
        if label is not None:
            members[label].append(index)

    # A group can reach over two classes, so the split of a group is decided once, for all classes.
    split_of: dict[int, str] = {}
    result: dict[tuple[str, str], list[int]] = {}
    for label in sorted(CLASSES):
        rng = random.Random(f"{seed}-{label}")
        picked = sorted(rng.sample(members[label], min(cap, len(members[label]))))
        sizes = Counter(int(groups[index]) for index in picked)
        order = sorted(sizes)
        rng.shuffle(order)
        wanted = round(val_share * len(picked))
        held = sum(sizes[group] for group in order if split_of.get(group) == "val")
        for group in order:
            if group in split_of:
                continue
            fits = sizes[group] <= max(1, len(picked) // 20) and held + sizes[group] <= wanted
            split_of[group] = "val" if fits else "train"
            held += sizes[group] if fits else 0
        for split in ("train", "val"):
            result[split, label] = [i for i in picked if split_of[int(groups[i])] == split]
    return result


def write_tar(
    path: Path, names: list[str], images: np.ndarray, chosen: dict[tuple[str, str], list[int]], quality: int
) -> None:
    """Write the images as JPEGs into an ImageFolder tar whose bytes depend on nothing but the images."""
    entries: dict[str, bytes] = {}
    for (split, label), indices in chosen.items():
        for index in indices:
            stem = re.sub(r"[^a-z0-9]+", "_", names[index].rsplit("/", 1)[1][:-4].lower()).strip("_")
            buffer = io.BytesIO()
            Image.fromarray(images[index]).save(buffer, "JPEG", quality=quality, optimize=True)
            entries[f"{split}/{label}/{stem}_{index:04d}.jpg"] = buffer.getvalue()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(entries):
            info = tarfile.TarInfo(name)
            info.size = len(entries[name])
            archive.addfile(info, io.BytesIO(entries[name]))


def main() -> None:
    """Read the library, choose and split the images, write the tar and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=LIBRARY, help="folder of the installed PNGs")
    parser.add_argument("--out", type=Path, default=Path("assets/clipart-12.tar"))
    parser.add_argument("--cache", type=Path, help="an .npz file that keeps the decoded library")
    parser.add_argument("--quality", type=int, default=76, help="JPEG quality")
    args = parser.parse_args()

    names, images = load_library(args.root, args.cache)
    chosen = choose(names, images, group_alike(names, images))
    write_tar(args.out, names, images, chosen, args.quality)
    print(f"{'class':10} train   val")
    for label in sorted(CLASSES):
        print(f"{label:10} {len(chosen['train', label]):5} {len(chosen['val', label]):5}")
    train, val = (sum(len(v) for (s, _), v in chosen.items() if s == split) for split in ("train", "val"))
    print(f"{'all':10} {train:5} {val:5}   {args.out} {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

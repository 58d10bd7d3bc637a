"""The labels of ImageNet's validation images, which their archive does not hold.

What people have, in the order in which it is looked for beside the archives:

- `ILSVRC2012_devkit_t12.tar.gz` (or `_t3`), from the page of the archives, or the folder it unpacks to:
  `data/ILSVRC2012_validation_ground_truth.txt` numbers the class of each image, `data/meta.mat` says which
  WordNet id has which number;
- `LOC_val_solution.csv` of Kaggle's copy: `ILSVRC2012_val_00000001,n01751748 111 108 …`;
- `imagenet_2012_validation_synset_labels.txt`, as many training codes ship it: the WordNet id of image i
  in line i.
"""

from __future__ import annotations

import io
import re
import tarfile
from typing import Any, NamedTuple

from cluster import storage
from cluster.errors import DataInvalid
from stages.shard.matfile import read_mat

DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t3.tar.gz")
TEXTS = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt")
_FOLDER = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_MAX_MEMBER_BYTES = 2**26
WNID = re.compile(r"n\d{8}")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


class GroundTruth(NamedTuple):
    """WordNet id of validation image i + 1 at position i, and class names for people where they are known."""

    wnids: list[str]
    names: dict[str, str]

    def wnid(self, image: str) -> str:
        """The class of `ILSVRC2012_val_<number>.JPEG`; raises DataInvalid beyond the list."""
        match = VAL_IMAGE.fullmatch(image.rpartition("/")[2])
        number = int(match.group(1)) if match else 0
        if not 1 <= number <= len(self.wnids):
            raise DataInvalid(
                f"validation image {image} has no label",
                expected=f"ILSVRC2012_val_00000001.JPEG … {len(self.wnids):08d}.JPEG",
                remedy="use the labels that belong to these images (`val_labels`)",
            )
        return self.wnids[number - 1]


def find(folder: str, given: str | None) -> str:
    """URI of the labels: `given`, else what lies in `folder`; raises DataInvalid when there is nothing."""
    for name in (*DEVKITS, f"{_FOLDER}/data/{_TRUTH}", *TEXTS) if given is None else ():
        if storage.exists(uri := storage.join(folder, name)):
            return uri
    if given is None:
        raise DataInvalid(
            f"the validation images of {folder} have no labels: their archive does not hold them",
            expected=f"one of {', '.join((DEVKITS[0], _FOLDER + '/', *TEXTS))} beside it",
            remedy="download the devkit from the page of the archives, set `val_labels`, or sort val into folders",
        )
    uri = storage.join(given)
    if storage.exists(uri):
        return uri
    for name in (_TRUTH, f"data/{_TRUTH}"):
        if storage.exists(inner := storage.join(uri, name)):
            return inner
    raise DataInvalid(f"val_labels: there is nothing at {uri}", remedy="correct the path")


def load(uri: str) -> GroundTruth:
    """Read labels of any of the kinds above; raises DataInvalid when they are not what they should be."""
    if uri.endswith((".tar.gz", ".tgz")):
        return _from_devkit(uri, *_unpack(uri))
    text = storage.read_bytes(uri)
    if uri.endswith(_TRUTH):
        return _from_devkit(uri, text, storage.read_bytes(storage.join(uri.rpartition("/")[0], _META)))
    lines = text.decode(errors="replace").split("\n")
    if uri.endswith(".csv"):
        pairs = sorted(line.split(",")[:2] for line in lines[1:] if line.strip())
        if any(pair[0] != f"ILSVRC2012_val_{number:08d}" for number, pair in enumerate(pairs, 1)):
            raise _unreadable(uri, "a line for each ILSVRC2012_val_<number>", "gaps or other names")
        wnids = [pair[1].split(" ")[0] for pair in pairs]
    else:
        wnids = [line.strip() for line in lines if line.strip()]
    wrong = next((item for item in wnids if not WNID.fullmatch(item)), None)
    if wrong is not None or not wnids:
        raise _unreadable(uri, "WordNet ids such as n01440764", wrong or "an empty file")
    return GroundTruth(wnids, {})


def _unpack(uri: str) -> tuple[bytes, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri)), mode="r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in (_TRUTH, _META) and member.isreg() and member.size <= _MAX_MEMBER_BYTES:
                    file = tar.extractfile(member)
                    found[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataInvalid(f"{uri} is not a readable devkit: {error}", remedy="download it again") from None
    if missing := {_TRUTH, _META} - set(found):
        raise DataInvalid(f"{uri} lacks {' and '.join(sorted(missing))}", remedy="download the devkit again")
    return found[_TRUTH], found[_META]


def _from_devkit(uri: str, truth: bytes, meta: bytes) -> GroundTruth:
    try:
        synsets: list[dict[str, Any]] = read_mat(meta)["synsets"]
        # Ids above 1,000 are inner nodes of the hierarchy, which no image is labelled with.
        wnids = {int(row["ILSVRC2012_ID"][0]): str(row["WNID"]) for row in synsets}
        names = {str(row["WNID"]): str(row["words"]) for row in synsets}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _unreadable(uri, "meta.mat with `synsets` (ILSVRC2012_ID, WNID, words)", error) from None
    numbers = truth.split()
    unknown = next((n for n in numbers if not n.isdigit() or int(n) not in wnids), None)
    if unknown is not None or not numbers:
        raise _unreadable(uri, f"class numbers 1 … {len(wnids)}", unknown or "an empty file")
    return GroundTruth([wnids[int(number)] for number in numbers], names)


def _unreadable(uri: str, expected: str, found: object) -> DataInvalid:
    return DataInvalid(
        f"the validation labels {uri} cannot be used",
        expected=expected,
        found=found,
        remedy="download them again",
    )

"""Decode only a region of a JPEG, by nvImageCodec's libjpeg-turbo backend on the CPU, where it is installed.

A random crop needs half of an image on average. libjpeg-turbo can skip the inverse transform of rows and
columns outside a region, but simplejpeg and Pillow do not expose it. The pixels are equal, bit for bit, to
those of a full decode (nvImageCodec decodes a margin and cuts it), for every JPEG that is whole. Damaged ones
may differ: libjpeg fills what is missing from where it stopped, and which damage is noticed depends on the rows
that are read. `verify: decode` keeps those that do not decode out of a data set.

The package is NVIDIA's, Apache-2.0, and runs without a GPU or CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from stages.data.crop import Box

_local = threading.local()  # decoders are not shared between threads


def decode_region(data: bytes, box: Box) -> np.ndarray | None:
    """uint8 (box.height, box.width, 3) RGB, or None where the package is missing or cannot decode the data.

    EXIF orientation is not applied; `box` is in stored pixels. Damage that libjpeg only warns about is
    not noticed here: the caller looks for the end marker.
    """
    codec = _codec()
    if codec is None:
        return None
    if not hasattr(_local, "decoder"):
        _local.decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
        )
        _local.params = codec.DecodeParams(apply_exif_orientation=False)
    region = codec.Region(
        start_y=box.top, start_x=box.left, end_y=box.top + box.height, end_x=box.left + box.width
    )
    try:
        stream = codec.CodeStream(data).get_sub_code_stream(region=region)
        image = _local.decoder.decode(stream, params=_local.params)
    except RuntimeError:
        return None
    return None if image is None else np.asarray(image)


def available() -> bool:
    """Whether region decoding works here."""
    return _codec() is not None


@functools.cache
def _codec() -> Any:
    """The package, loaded with its libjpeg-turbo extension only, or None.

    Its other extensions would look for nvJPEG and CUDA, print errors where there are none, and open a
    CUDA context in every loader process where there are.
    """
    try:
        spec = importlib.util.find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    before = {name: os.environ.get(name) for name in ("NVIMGCODEC_EXTENSIONS_PATH", "PYNVIMGCODEC_VERBOSITY")}
    with tempfile.TemporaryDirectory(prefix="itpn-codec-") as folder:
        for extension in (Path(spec.origin).parent / "extensions").glob("libjpeg_turbo_ext*"):
            (Path(folder) / extension.name).symlink_to(extension)
        os.environ |= {"NVIMGCODEC_EXTENSIONS_PATH": folder, "PYNVIMGCODEC_VERBOSITY": "0"}
        try:
            from nvidia import nvimgcodec

            # Extensions are read from the folder when the first decoder is made.
            nvimgcodec.Decoder(
                device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
                backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
            )
        except (ImportError, RuntimeError, AttributeError):
            return None
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
    return nvimgcodec

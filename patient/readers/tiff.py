"""Multi-page TIFF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from patient.readers import pictures
from patient.readers.common import chosen_volume, grey, listed, reason, stacked
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import check_pixels


def read(path: Path, choice: Choice) -> Volume:
    """A multi-page TIFF; of one with two axes of pages (ImageJ, OME), `index` chooses along the first."""
    try:
        with tifffile.TiffFile(path) as file:
            if len(file.series) != 1:
                sizes = listed([" x ".join(map(str, series.shape)) for series in file.series])
                raise UserError(
                    f"{path} holds pages of several kinds ({sizes}): frames have one size and one kind"
                )
            pages, page = file.series[0], file.pages.first
            check_pixels(path, page.imagewidth, page.imagelength)
            array, axes = pages.asarray(), pages.axes
            if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
                array = grey(np.moveaxis((page.colormap[:, array] // 257).astype(np.uint8), 0, -1))
            elif page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                array = np.invert(array)
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise whatever they meet
        if "imagecodecs" in str(error):
            return pictures.read(path, choice)  # LZW, JPEG and fax codes, which Pillow brings along
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    if "S" in axes and array.ndim == len(axes):
        array, axes = np.moveaxis(array, axes.index("S"), -1), axes.replace("S", "") + "S"
    array = array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
    paged = axes.replace("S", "")[:-2]
    chosen = None
    if len(paged) == 2:
        chosen = chosen_volume(path, array.shape[0], choice.frame)
        array = array[chosen or 0]
    elif len(paged) != 1:
        what = f"{len(paged) + 2}-D ({axes})" if paged else "one page"
        raise UserError(f"{path} holds {what}: a stack has two pages or more, along one axis")
    if array.dtype.kind not in "uif" or (array.ndim == 4 and array.shape[3] not in (3, 4)):
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}: frames are real numbers, grey or RGB"
        )
    return stacked(array, path.name, [], index=chosen)

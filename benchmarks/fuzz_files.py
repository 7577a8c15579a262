"""Mutated headers of every kind of volume: none may cause a traceback, a crash, or excessive memory or time.

    python -m benchmarks.fuzz_files --count 20000

Small files of each kind are made, bytes of their headers are changed, and each is read in a process that is reused
until it dies: a valid answer is a volume or one line of error. Recorded in benchmarks/results/fuzz_files.json.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tifffile
from PIL import Image

from patient.readers import read_volume
from patient.readers.segments import read_segments
from utils.errors import ArgumentParser, UserError, positive, run
from utils.images import read_image

MOST_SECONDS, MOST_BYTES = 5.0, 1 << 30
HEADER = 2048  # bytes at the start, where most changes go
SHAPE = (16, 14, 6)


def samples(folder: Path) -> dict[str, Path]:
    """A small file of each kind, by name."""
    values = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 251).astype(np.int16)
    affine = np.diag([-0.8, 0.9, 3.0, 1.0])
    files: dict[str, Path] = {}

    def keep(name: str) -> Path:
        files[name] = folder / name
        return files[name]

    nibabel.save(nibabel.Nifti1Image(values, affine), keep("a.nii"))
    nibabel.save(nibabel.Nifti2Image(values, affine), keep("b.nii"))
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), keep("c.nii.gz"))
    _nrrd(keep("a.nrrd"), values)
    _meta(keep("a.mha"), values)
    frames = np.ascontiguousarray(values.astype(np.uint8).transpose(2, 1, 0))
    tifffile.imwrite(keep("a.tif"), frames, photometric="minisblack")
    metadata = {"axes": "ZYX", "spacing": 2.0, "unit": "um"}
    tifffile.imwrite(keep("b.tif"), frames, imagej=True, resolution=(2, 2), metadata=metadata)
    tifffile.imwrite(
        keep("c.ome.tif"), frames, compression="zlib", metadata={"axes": "ZYX", "PhysicalSizeX": 0.5}
    )
    pages = [Image.fromarray(frame) for frame in frames]
    pages[0].save(keep("a.gif"), save_all=True, append_images=pages[1:])
    pages[0].save(keep("a.png"))
    Image.fromarray(values[:, :, 0].astype(np.uint16)).save(keep("b.png"))
    _dicom(folder, values, keep)
    _video(frames, keep)
    return files


def _nrrd(path: Path, values: np.ndarray) -> None:
    lines = [
        "NRRD0005",
        "type: short",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {_words(values.shape)}",
    ]
    lines += [
        "space directions: (0.8,0,0) (0,0.9,0) (0,0,3)",
        "kinds: domain domain domain",
        "endian: little",
    ]
    lines += ["encoding: raw", "space origin: (1,2,3)", "", ""]
    path.write_bytes("\n".join(lines).encode() + values.tobytes(order="F"))


def _meta(path: Path, values: np.ndarray) -> None:
    lines = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    lines += ["TransformMatrix = 1 0 0 0 1 0 0 0 1", "Offset = 1 2 3", "ElementSpacing = 0.8 0.9 3"]
    lines += [f"DimSize = {_words(values.shape)}", "ElementType = MET_SHORT", "ElementDataFile = LOCAL", ""]
    path.write_bytes("\n".join(lines).encode() + values.tobytes(order="F"))


def _words(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def _dicom(folder: Path, values: np.ndarray, keep: Callable[[str], Path]) -> None:
    import pydicom

    def item(**tags: Any) -> Any:
        dataset = pydicom.Dataset()
        for name, value in tags.items():
            setattr(dataset, name, value)
        return dataset

    count = values.shape[2]
    dataset = item(Modality="CT", Rows=values.shape[1], Columns=values.shape[0], NumberOfFrames=count)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.EnhancedCTImageStorage
    dataset.SOPInstanceUID = dataset.SeriesInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = (
        "1.2.3"
    )
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = (
        1,
        "MONOCHROME2",
        1,
    )
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelMeasuresSequence=[item(PixelSpacing=[0.9, 0.8], SliceThickness=3)],
            PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-10, RescaleType="HU")],
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 3 * k])]) for k in range(count)
    ]
    dataset.PixelData = np.ascontiguousarray(values.transpose(2, 1, 0)).tobytes()
    dataset.save_as(keep("a.dcm"), enforce_file_format=True)
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(keep("b.dcm"), enforce_file_format=True)
    dataset.decompress()
    dataset.compress(pydicom.uid.JPEGLSLossless)
    dataset.save_as(keep("c.dcm"), enforce_file_format=True)
    dataset.decompress()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    dataset.SegmentationType, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = "BINARY", 8, 8, 7
    dataset.PixelRepresentation = 0
    dataset.SegmentSequence = [item(SegmentNumber=1, SegmentLabel="one")]
    for group in dataset.PerFrameFunctionalGroupsSequence:
        group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=1)]
    dataset.PixelData = (values > 100).astype(np.uint8).transpose(2, 1, 0).tobytes()
    dataset.save_as(keep("seg.dcm"), enforce_file_format=True)


def _video(frames: np.ndarray, keep: Callable[[str], Path]) -> None:
    try:
        import imageio_ffmpeg
    except ImportError:
        return
    height, width = 48, 64
    writer = imageio_ffmpeg.write_frames(str(keep("a.mp4")), (width, height))
    writer.send(None)
    for frame in frames:
        writer.send(np.full((height, width, 3), int(frame[0, 0]), np.uint8).tobytes())
    writer.close()


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one to four changes, most of them in the header: set, overwritten, cut off, inserted, deleted."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        top = min(len(out), HEADER) if chance.random() < 0.85 else len(out)
        at = chance.randrange(max(top, 1))
        kind = chance.random()
        if kind < 0.45 and out:
            out[at % len(out)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind < 0.75:
            size = chance.choice((2, 4, 8))
            out[at : at + size] = chance.choice(
                (bytes(size), b"\xff" * size, b"\x7f" * size, chance.randbytes(size))
            )
        elif kind < 0.85:
            del out[at : at + chance.randint(1, 16)]
        elif kind < 0.95:
            out[at:at] = chance.randbytes(chance.randint(1, 16))
        else:
            del out[max(at, 1) :]
    return bytes(out)


def read(path: Path) -> str:
    """Read a file as the programs do; returns the outcome in a word. Anything but a UserError is a bug."""
    try:
        if path.name.startswith("seg"):
            segments = read_segments(path)
            if segments is not None:
                return "read"
        if path.suffix == ".png":
            read_image(path)
        else:
            read_volume(path)
    except UserError as error:
        if "\n" in str(error):
            raise RuntimeError(f"more than one line: {error}") from error
        if "holds" in str(error) and "volumes: choose" in str(error):
            return "asked"
        return "refused"
    return "read"


def _worker(pipe: Any) -> None:
    # Twice what is allowed: anything beyond fails as an allocation, which can be told from a crash.
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    resource.setrlimit(resource.RLIMIT_DATA, (base + 2 * MOST_BYTES, base + 2 * MOST_BYTES))
    while (path := pipe.recv()) is not None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.process_time()
        try:
            word = read(path)
        except BaseException as error:  # what a user would see as a traceback
            word = f"traceback: {type(error).__name__}: {str(error)[:200]}"
        after = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
        pipe.send(
            (word, time.process_time() - began, (after.ru_maxrss << 10) - base, children, before.ru_maxrss)
        )


def fuzz(count: int, seed: int, kinds: list[str] | None = None, keep: Path | None = None) -> dict[str, Any]:
    """Read `count` mutated files, spread over the kinds; returns what happened, and the worst of each."""
    words: dict[str, Counter[str]] = {}
    worst = {"seconds": (0.0, ""), "bytes": (0, "")}
    bad: list[str] = []
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as place:
        originals = {name: path.read_bytes() for name, path in samples(Path(place)).items()}
        names = [name for name in originals if kinds is None or name in kinds]
        work = Path(place, "work")
        work.mkdir()
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs,), daemon=True)
        process.start()
        for n in range(count):
            name = names[n % len(names)]
            data = mutated(originals[name], random.Random(f"{seed} {n}"))
            path = work / name
            path.write_bytes(data)
            ours.send(path)
            answered = ours.poll(4 * MOST_SECONDS)
            seconds, used = 0.0, 0
            if answered and (answer := _received(ours)):
                word, seconds, used = answer[:3]
            else:
                process.kill()
                process.join()
                word = f"crash: exit status {process.exitcode}"
                ours, theirs = context.Pipe()
                process = context.Process(target=_worker, args=(theirs,), daemon=True)
                process.start()
            kind = word.split(":")[0]
            words.setdefault(name, Counter())[kind] += 1
            if seconds > worst["seconds"][0]:
                worst["seconds"] = (seconds, f"{name} {n}")
            if used > worst["bytes"][0]:
                worst["bytes"] = (used, f"{name} {n}")
            if kind in ("traceback", "crash") or seconds > MOST_SECONDS or used > MOST_BYTES:
                bad.append(f"{name} {n}: {word}, {seconds:.1f} s, {used >> 20} MiB")
                if keep is not None:
                    keep.mkdir(exist_ok=True)
                    (keep / f"{n}_{name}").write_bytes(data)
        ours.send(None)
        process.join()
    return {
        "count": count,
        "kinds": {name: dict(told) for name, told in words.items()},
        "worst": worst,
        "bad": bad,
    }


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None


def main() -> int:
    parser = ArgumentParser(
        prog="python -m benchmarks.fuzz_files", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--count", type=positive, default=20_000, help="files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", metavar="NAME", help="samples to mutate (default: all)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for files that went wrong")
    options = parser.parse_args()
    told = fuzz(options.count, options.seed, options.kinds, options.keep)
    print(json.dumps(told, indent=1))
    return 1 if told["bad"] else 0


if __name__ == "__main__":
    run(main)

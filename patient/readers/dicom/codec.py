"""Compressed pixels, decoded in a separate process: codecs in C++ may crash or never end on a damaged stream.

This file is also the program of that process. It reads a path and the bytes that its pixels claim per line, as JSON,
and answers with a line of JSON and, on success, the array's bytes. What takes much more time or memory than that many
bytes need ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from typing import IO, Any

import numpy as np

_SECONDS, _BYTES_PER_SECOND = 3.0, 1e6  # of a processor: the slowest codecs decode 5 MB per second
_BYTES, _COPIES = 1 << 29, 8  # memory beyond that of the libraries
_TWELVE_BITS = "1.2.840.10008.1.2.4.51"  # JPEG Extended


class Decoder:
    """The process, started when it is first needed; it ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, path: str, claimed: int) -> np.ndarray:
        """What pydicom decodes, colours as RGB. Raises RuntimeError with what it says, or that the process died.

        claimed: bytes of pixels that the header promises.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps([path, claimed]).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._process.wait()
            raise RuntimeError("its compressed pixels cannot be decoded")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        array = np.empty(answer["shape"], answer["dtype"])
        if stdout.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
            raise RuntimeError("its compressed pixels cannot be decoded")
        return array


decoder = Decoder()


def _answer(path: str, claimed: int, out: IO[bytes]) -> None:
    import pydicom

    answer: dict[str, Any]
    _limit(claimed)
    try:
        dataset = pydicom.dcmread(path, force=True)
        _choose(dataset.file_meta.TransferSyntaxUID)
        array = np.ascontiguousarray(pydicom.pixels.pixel_array(dataset))
        answer = {"shape": array.shape, "dtype": array.dtype.str}
    except Exception as error:  # damaged bytes raise whatever they meet
        array, answer = np.empty(0), {"error": f"{type(error).__name__}: {error}"}
    out.write(json.dumps(answer).encode() + b"\n")
    out.write(array.tobytes())
    out.flush()


def _limit(claimed: int) -> None:
    """Let the process die of too much memory or processor time."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + _BYTES + _COPIES * claimed
    resource.setrlimit(
        resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )
    signal.setitimer(signal.ITIMER_PROF, _SECONDS + claimed / _BYTES_PER_SECOND)


def _choose(syntax: Any) -> None:
    """Leave out pylibjpeg where GDCM decodes too: of damaged streams it takes minutes to say so."""
    from pydicom.pixels import get_decoder

    decoder = get_decoder(syntax)
    others = set(decoder.available_plugins) - {"pylibjpeg"}
    if "pylibjpeg" in decoder.available_plugins and "gdcm" in others and syntax != _TWELVE_BITS:
        decoder.remove_plugin("pylibjpeg")


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    for line in sys.stdin.buffer:
        path, claimed = json.loads(line)
        _answer(path, claimed, out)


if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != os.path.dirname(__file__)]
    main()

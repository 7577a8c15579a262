"""Compressed pixels, decoded in a separate process: codecs in C++ may crash on a damaged stream.

This file is also the program of that process. It reads one path per line, as JSON, and answers with a line of JSON
and, on success, the array's bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import IO, Any

import numpy as np


class Decoder:
    """The process, started when it is first needed; it ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, path: str) -> np.ndarray:
        """What pydicom decodes, colours as RGB. Raises RuntimeError with what it says, or that the process died."""
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
            stdin.write(json.dumps(path).encode() + b"\n")
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


def _answer(path: str, out: IO[bytes]) -> None:
    import pydicom

    answer: dict[str, Any]
    try:
        array = np.ascontiguousarray(pydicom.pixels.pixel_array(pydicom.dcmread(path, force=True)))
        answer = {"shape": array.shape, "dtype": array.dtype.str}
    except Exception as error:  # damaged bytes raise whatever they meet
        array, answer = np.empty(0), {"error": f"{type(error).__name__}: {error}"}
    out.write(json.dumps(answer).encode() + b"\n")
    out.write(array.tobytes())
    out.flush()


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    for line in sys.stdin.buffer:
        _answer(json.loads(line), out)


if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != os.path.dirname(__file__)]
    main()

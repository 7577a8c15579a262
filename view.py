#!/usr/bin/env python3
"""Shows a trained model in the browser: any position live, three planes and 3-D, masks, mesh, Gaussians.

    python view.py -m OUTPUT

serves one page on this machine alone; --help lists every option.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from arguments import RenderOptions, model_options
from utils.errors import ArgumentParser, UserError, positive, run

LOCAL = ("localhost", "127.0.0.1", "::1")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"the viewer needs {' and '.join(missing)}: pip install starlette uvicorn")
    import uvicorn

    from viewer.case import Case
    from viewer.server import application

    case = Case.open(_render_options(options), options.reference, options.mesh, say)
    listening = _listen(options.host, options.port)
    port = listening.getsockname()[1]
    if options.host not in LOCAL:
        print(
            f"view.py: --host {options.host}: everyone who reaches this machine's port {port} can see this case",
            file=sys.stderr,
            flush=True,
        )
    shown = f"[{options.host}]" if ":" in options.host else options.host
    model = case.model
    say(
        f"{case.name}: iteration {case.trained.iteration}, {len(model):,} Gaussians, {model.num_frames} frames"
    )
    say(f"http://{shown}:{port}/  (Ctrl-C ends it)")
    hosts = ["*"] if options.host in ("0.0.0.0", "::") else [*LOCAL, "[::1]", options.host]
    config = uvicorn.Config(application(case, hosts), log_level="error", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def parser() -> argparse.ArgumentParser:
    line = ArgumentParser(prog="view.py", description=(__doc__ or "").split("\n")[0])
    line.add_argument("-m", "--model_path", required=True, help="the trained model's folder")
    line.add_argument(
        "--iteration", type=int, default=-1, help="chkpnt<iteration>.pth is shown (default -1: the newest)"
    )
    line.add_argument(
        "-s", "--source_path", help="data root of the input frames, where it is not where it was in training"
    )
    line.add_argument(
        "--reference", help="a volume to compare with, such as the source: NIfTI, DICOM, NRRD, ..."
    )
    line.add_argument("--mesh", help="a mesh of slices_to_ply.py (default: made of the model's masks)")
    line.add_argument(
        "--port", type=_port, default=8080, help="to serve on; 0: any that is free (default: 8080)"
    )
    line.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve on (default: 127.0.0.1, this machine alone; with another, whoever reaches it can look)",
    )
    line.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    line.add_argument("--threads", type=positive, metavar="N", help="processors to draw with (default: all)")
    line.add_argument("--quiet", action="store_true", help="print errors only")
    line.add_argument("--debug", action="store_true", help="print the traceback of an error too")
    return line


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: 0 to 65535")
    return int(text)


def _render_options(options: argparse.Namespace) -> RenderOptions:
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    given = {
        name: getattr(options, name) for name in ("model_path", "iteration", "source_path", "device", "quiet")
    }
    return model_options({name: value for name, value in given.items() if value is not None})


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `UserError` where the port is taken or the address is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror or error}; give another port, or 0"
        ) from None
    return listening


if __name__ == "__main__":
    run(main)

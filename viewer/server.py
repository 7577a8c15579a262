"""Answers the page's requests: pictures of the model at any position, volumes, meshes, numbers. Of files, it serves
only the page's own."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from scene.checkpoint import all_of
from utils.errors import UserError
from utils.files import is_owned
from viewer.case import Case
from viewer.pages import mesh_parts

PAGE = Path(__file__).parent / "page"
SHARED = Path(__file__).parents[1] / "pictures" / "web"
MOST_VOXELS = 48_000_000  # of a dense volume in the browser
_MOST_ELLIPSES = 20_000
_CLIENTS = 64  # open pages to keep track of
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'"
)
Result = TypeVar("Result")


class Latest:
    """Handles one request at a time. Older requests of a page that have not begun are dropped for its newest one."""

    def __init__(self) -> None:
        self.newest: OrderedDict[str, int] = OrderedDict()
        self.turn = asyncio.Lock()
        self.done = self.dropped = 0

    async def __call__(self, client: str, number: int, work: Callable[[], Result]) -> Result | None:
        """The result of ``work``, or None if a later request of ``client`` arrived before its turn."""
        self.newest[client] = max(number, self.newest.pop(client, 0))
        while len(self.newest) > _CLIENTS:
            self.newest.popitem(last=False)
        async with self.turn:
            if number < self.newest.get(client, 0):
                self.dropped += 1
                return None
            self.done += 1
            return await asyncio.to_thread(work)


class Dense:
    """The dense volumes and the mesh of one checkpoint, made once."""

    def __init__(self, case: Case) -> None:
        self.case, self.lock = case, asyncio.Lock()
        self.progress = 0.0
        self.made: dict[str, bytes] = {}
        self.of = -1

    async def __call__(self, what: str) -> bytes | None:
        async with self.lock:
            if self.of != self.case.trained.iteration:
                self.of, self.progress = self.case.trained.iteration, 0.0
                self.made = await asyncio.to_thread(self._make)
        return self.made.get(what)

    def _make(self) -> dict[str, bytes]:
        def progress(share: float) -> None:
            self.progress = share

        case = self.case
        images, masks = case.volumes(case.sub_frames(MOST_VOXELS), progress)
        made = {"image.nii": images.image.to_bytes()}
        if masks is not None:
            made["mask.nii"] = masks.image.to_bytes()
        return made | mesh_parts(case, None if masks is None else masks.image)


def packed(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """A JSON header and arrays in one answer: the header's length (4 bytes, little endian), the header, padding to four
    bytes, then each array, little endian, padded too. The header names their types and shapes."""
    header = {
        **header,
        "arrays": [
            {"name": name, "dtype": array.dtype.name, "shape": array.shape} for name, array in arrays.items()
        ],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    parts = [len(text).to_bytes(4, "little"), text]
    for array in arrays.values():
        data = np.ascontiguousarray(array).tobytes()
        parts += [data, b"\0" * (-len(data) % 4)]
    return b"".join(parts)


def application(case: Case, hosts: list[str]) -> Starlette:
    """The viewer of ``case``. ``hosts``: host names that browsers may use, so that no other site can connect."""
    latest, dense = Latest(), Dense(case)
    last = case.model.num_frames - 1

    def position_of(request: Request) -> float:
        try:
            position = float(request.query_params.get("t", "0"))
        except ValueError:
            position = math.nan
        if not 0 <= position <= last:
            raise HTTPException(400, f"t is a position from 0 to {last}")
        return position

    def number_of(request: Request, name: str, default: int = 0) -> int:
        text = request.query_params.get(name, "")
        return int(text) if text.isdecimal() and len(text) < 16 else default

    async def about(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(describe, case))

    async def view(request: Request) -> Response:
        position, query = position_of(request), request.query_params
        most = min(number_of(request, "ellipses"), _MOST_ELLIPSES)
        what = query.get("against", "")
        made = await latest(
            query.get("client", "")[:40],
            number_of(request, "n"),
            lambda: picture(case, position, what, most),
        )
        if made is None:
            return Response(status_code=204, headers={"X-Dropped": "overtaken"})
        return Response(made, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    async def volume(request: Request) -> Response:
        name = request.path_params["name"]
        if name == "meshes":
            await dense(name)
            return JSONResponse([part for part in dense.made if part.endswith(".ply")])
        made = await dense(name)
        if made is None:
            raise HTTPException(404, f"this case has no {name}")
        return Response(made, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    async def slice_file(request: Request) -> Response:
        position = position_of(request)
        data = await asyncio.to_thread(slice_nifti, case, position)
        name = f"{case.name}_{position:.3f}.nii"
        headers = {
            "Content-Disposition": f'attachment; filename="{name.encode("ascii", "replace").decode()}"'
        }
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def state(request: Request) -> Response:
        folder = Path(case.options.model_path)
        return JSONResponse(
            {
                "drawn": latest.done,
                "dropped": latest.dropped,
                "volume": dense.progress,
                "iteration": case.trained.iteration,
                "newest": max(all_of(folder), default=-1),
                "training": is_owned(folder),
            }
        )

    async def reload(request: Request) -> Response:
        await asyncio.to_thread(case.reload)
        return await about(request)

    async def page(request: Request) -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html")

    async def with_policy(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        text = error.detail if isinstance(error, HTTPException) else str(error)
        return JSONResponse({"error": text}, status_code=status)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/api/about", about),
            Route("/api/view", view),
            Route("/api/state", state),
            Route("/api/reload", reload, methods=["POST"]),
            Route("/api/slice.nii", slice_file),
            Route("/api/volume/{name}", volume),
            Mount("/shared", StaticFiles(directory=SHARED)),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={HTTPException: with_policy, UserError: with_policy},
    )

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await app(scope, receive, answer if scope["type"] == "http" else send)

    return guarded  # type: ignore[return-value]


def describe(case: Case) -> dict[str, Any]:
    """What the page needs before it can draw."""
    model, geometry, (width, height) = case.model, case.placed, case.size
    count = model.num_frames
    places = np.array([[0, 0, k] for k in range(count)] + [[1, 0, 0], [0, 1, 0]], np.float64)
    patient = geometry.to_patient(places, case.size)
    assert patient is not None
    spacing = geometry.spacing
    assert spacing is not None
    factor = geometry.size[0] / width, geometry.size[1] / height
    low, high = geometry.window
    return {
        "name": case.name,
        "iteration": case.trained.iteration,
        "frames": count,
        "width": width,
        "height": height,
        "channels": case.channels,
        "bits": case.trained.bits,
        "unit": case.unit,
        "pixel": [spacing[0] * factor[0], spacing[1] * factor[1]],
        "window": [low, high],
        "ct": case.in_hounsfield,
        "origins": patient[:count].tolist(),
        "column": (patient[count] - patient[0]).tolist(),
        "row": (patient[count + 1] - patient[0]).tolist(),
        "slices": list(geometry.slices),
        "heldout": case.heldout_positions,
        "comparisons": case.comparisons(),
        "missing": case.inputs.missing,
        "masks": case.has_masks,
        "labels": case.labels,
        "soft": case.table is None,
        "given": case.mesh is not None,
        "gaussians": len(model),
        "heads": list(model.heads),
    }


def picture(case: Case, position: float, against: str, most_ellipses: int) -> bytes:
    """The render at ``position`` and whatever else was requested."""
    start = time.perf_counter()
    images, masks, active = case.drawn([position])
    drawn = time.perf_counter() - start
    arrays = {"image": images[0]}
    header: dict[str, Any] = {
        "t": position,
        "iteration": case.trained.iteration,
        "ms": 1000 * drawn,
        "active": int(active[0]),
    }
    if masks is not None:
        if case.table is None:
            arrays["mask"] = (masks[0] * np.float32(255)).round().astype(np.uint8)
        else:
            arrays["mask"] = masks[0].astype(case.table.dtype)
    if against:
        other, place, words = case.against(against, position)
        arrays["other"] = np.ascontiguousarray(other, np.float32)
        header["against"] = {"kind": against, "t": place, "words": words}
    if most_ellipses:
        found = case.ellipses(position, most_ellipses)
        arrays["ellipses"] = found.pop("values")
        header["gaussians"] = found
    header["scores"] = case.scores(position, images[0], None if masks is None else masks[0])
    return packed(header, arrays)


def slice_nifti(case: Case, position: float) -> bytes:
    """The render at ``position`` as a NIfTI volume of one slice, in its place: (column, row, 1), source intensities."""
    images, _ = case.draw([position])
    corners = np.array([[0, 0, position], [1, 0, position], [0, 1, position]], np.float64)
    placed = case.placed.to_patient(corners, case.size)
    assert placed is not None
    column, row = placed[1] - placed[0], placed[2] - placed[0]
    normal = np.cross(column, row)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 3] = column, row, placed[0]
    affine[:3, 2] = normal / np.linalg.norm(normal) * min(np.linalg.norm(column), np.linalg.norm(row))
    low, high = case.placed.window
    values = low + images[0].mean(0).T[:, :, None] * np.float32(high - low)
    image = nibabel.Nifti1Image(values.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    return image.to_bytes()

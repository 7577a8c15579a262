"""Pages that are one file: scripts, pictures and volumes inside, to be mailed and opened without a server."""

from __future__ import annotations

import base64
import gzip
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WEB = Path(__file__).parent / "web"


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def document(
    title: str, body: str, parts: Mapping[str, bytes], scripts: Sequence[str], style: str = ""
) -> str:
    """A page. ``parts``: binary data, which scripts get by `part(name)` (web/page.js); with any, NiiVue comes too.

    ``scripts``: JavaScript that runs when the page is there. Nothing is loaded from elsewhere, and the page's own
    policy forbids it.
    """
    shared = ["page.js"]
    if parts:
        parts = {"niivue.js": (WEB / "niivue.js").read_bytes(), **parts}
        shared.append("volume.js")
    code = [(WEB / name).read_text(encoding="utf-8") for name in shared] + list(scripts)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data: blob:; '
            "connect-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>",
            f"<style>\n{(WEB / 'style.css').read_text(encoding='utf-8')}\n{style}</style></head>",
            f"<body>\n{body}",
            *(
                f'<script type="application/gzip" id="part-{escape(name)}">{_packed(data)}</script>'
                for name, data in parts.items()
            ),
            *(f"<script>\n{text}\n</script>" for text in code),
            "</body></html>\n",
        ]
    )


def _packed(data: bytes) -> str:
    packed = data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def picture(image: np.ndarray, quality: int = 88) -> str:
    """(H, W) or (H, W, 3) in [0, 1] as an address that holds it: WebP."""
    levels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "WEBP", quality=quality)
    return _address("image/webp", file.getvalue())


def picture_file(path: Path, widest: int = 1600) -> str:
    """An image file as an address that holds it, no wider than that: JPEG."""
    file = io.BytesIO()
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((widest, 10 * widest))
        image.save(file, "JPEG", quality=88)
    return _address("image/jpeg", file.getvalue())


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"

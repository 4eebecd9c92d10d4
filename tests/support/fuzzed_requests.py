"""Mutated requests to POST /detect: content types, queries, headers, and bodies in every form with valid and broken images."""

import base64
import json
import random
from dataclasses import dataclass

from tests.support.fuzzed_images import mutated, valid_images

BOUNDARY = b"XX"
KINDS = (b"image/png", b"multipart/form-data; boundary=XX", b"application/json")
ODD_KINDS = (
    *(b"", b"text/plain", b"image/", b"IMAGE/JPEG; q=1", b"application/json; charset=utf-16", b"multipart/form-data"),
    *(
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=\xff\xfe",
        b"application/json;;;=",
        b"a" * 3000,
    ),
    b"multipart/form-data; boundary=" + b"X" * 500,
)
QUERIES = (
    *(b"threshold=0.3", b"max_detections=5", b"threshold=0.3&max_detections=7", b"threshold=nan", b"threshold=-1"),
    *(b"coverage=0.9", b"coverage=0", b"coverage=1e-9"),
    *(b"max_detections=0", b"max_detections=1e9", b"threshold=%ff%fe", b"threshold", b"=", b"&&&", b"a=1&a=2", b"%"),
    *(b"threshold=0.1&threshold=0.2", b"threshold=" + b"9" * 2000, b"images=x", b"\x00=\x00"),
)


@dataclass(frozen=True)
class FuzzedRequest:
    """Request to POST /detect."""

    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class RequestFuzzer:
    """Endless source of requests; equal seeds give equal requests."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._images = list(valid_images().values())

    def request(self) -> FuzzedRequest:
        """Make the next request."""
        rng = self._rng
        form = rng.randrange(3)
        body = (self._image, self._form, self._json)[form]()
        if rng.random() < 0.5:
            body = mutated(body, self._images, rng)
        kind = KINDS[form] if rng.random() < 0.8 else rng.choice((*KINDS, *ODD_KINDS))
        query = rng.choice(QUERIES) if rng.random() < 0.3 else b""
        headers = [(b"content-type", kind)] if kind or rng.random() < 0.5 else []
        if rng.random() < 0.1:
            headers.append(
                rng.choice(((b"content-encoding", b"gzip"), (b"accept", b"\xff"), (b"x-request-timeout-seconds", b"0")))
            )
        return FuzzedRequest(query, headers, body)

    def _image(self) -> bytes:
        image = self._rng.choice(self._images)
        return mutated(image, self._images, self._rng) if self._rng.random() < 0.5 else image

    def _form(self) -> bytes:
        rng, parts = self._rng, []
        for number in range(rng.choice((0, 1, 1, 2, 6))):
            name = rng.choice((b"image", b"image", b"image", b"threshold", b"max_detections", b"picture", b"", b"\xff"))
            file = b'; filename="a\xc3"' if rng.random() < 0.8 else b""
            content = self._image() if name == b"image" else rng.choice((b"0.2", b"5", b"\xff", b"", b"x" * 70_000))
            head = b'Content-Disposition: form-data; name="' + name + b'"' + file
            parts.append(b"--XX\r\n" + head + b"\r\n\r\n" + content + b"\r\n")
            del number
        return b"".join(parts) + rng.choice((b"--XX--\r\n", b"--XX--", b"--XX", b""))

    def _json(self) -> bytes:
        rng = self._rng
        images = [base64.b64encode(self._image()).decode() for _ in range(rng.choice((0, 1, 1, 2, 6)))]
        if rng.random() < 0.2:
            images.append(rng.choice(("data:image/png;base64,eA==", "/etc/passwd", "====", "\u00e9", "A", "")))
        odd = (None, 3, "0.5", [], {}, 1e400, -1, True, "\ud800")
        content: dict[str, object] = {"images": images if rng.random() < 0.9 else rng.choice((None, 3, "x", {}, [1]))}
        for name in ("threshold", "max_detections", "url"):
            if rng.random() < 0.15:
                content[name] = rng.choice((0.5, 5, *odd))
        whole: object = content if rng.random() < 0.95 else rng.choice((images, None, 3))
        return json.dumps(whole).encode()

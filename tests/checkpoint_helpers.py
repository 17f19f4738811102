"""What the tests of checkpoints share: networks of every kind and layout, and a server that misbehaves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from model_helpers import randomise, tiny
from torch import nn

from dla_fast.models import DLASeg, to_original
from dla_fast.nn import DLAUp, Tree


class Detector(nn.Module):
    """As detectors are built: a network under ``base``, a neck, a last ladder, and heads by name."""

    def __init__(self, classes: int = 3, **kwargs) -> None:
        super().__init__()
        self.base = tiny(features_only="num_classes" not in kwargs, **kwargs)
        self.dla_up = DLAUp([8, 8, 12, 16])
        self.ida_up = DLAUp([8, 8]).ida_0
        self.hm = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, classes, 1))
        self.wh = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))


def segmenter(classes: int = 3) -> DLASeg:
    return DLASeg(tiny(features_only=True), classes, 4)


def with_projects(model: nn.Module) -> nn.Module:
    """The project layers that nothing uses, as the original code registers them."""
    for name, value in to_original(model.state_dict()).items():
        path, found, rest = name.partition(".project.")
        if found and name not in model.state_dict() and rest == "0.weight":
            tree = model.get_submodule(path)
            assert isinstance(tree, Tree)
            tree.project = nn.Sequential(
                nn.Conv2d(value.shape[1], value.shape[0], 1, bias=False), nn.BatchNorm2d(len(value))
            )
    return model


KINDS = {
    "classification": tiny,
    "segmentation": segmenter,
    "detection": Detector,
    "detection with a head in its base": lambda: Detector(num_classes=5),
    "classification, original": lambda: with_projects(tiny()),
    "segmentation, original": lambda: with_projects(segmenter()),
    "detection, original": lambda: with_projects(Detector()),
}


def drawn(kind: str) -> nn.Module:
    """A network with weights that cannot be taken for another's."""
    return randomise(KINDS[kind]())


@dataclass
class Server:
    """A server on this machine.

    Attributes:
        files: bytes by path.
        ways: by path, how it misbehaves: "breaks off", "no ranges", "no tag", "elsewhere" (a redirect to that path).
        asked: what was asked for: path, and the range if any.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    tag: str = '"1"'
    url: str = ""


@contextlib.contextmanager
def serving(each: int = 4000) -> Iterator[Server]:
    """Serve; what breaks off does so after ``each`` bytes."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append((self.path, self.headers.get("Range")))
            way = server.ways.get(self.path, "")
            if way.startswith("/"):
                self.send_response(302)
                self.send_header("Location", way)
                self.end_headers()
                return
            if self.path not in server.files:
                self.send_error(404)
                return
            data, start = server.files[self.path], 0
            asked = self.headers.get("Range")
            if self.headers.get("If-Range") not in (None, server.tag) or way == "no ranges":
                asked = None
            if asked is not None:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start and start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.end_headers()
                return
            self.send_response(200 if asked is None else 206)
            self.send_header("Content-Length", str(len(data) - start))
            if asked is not None:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if way != "no tag":
                self.send_header("ETag", server.tag)
            self.end_headers()
            once = way == "breaks off once"
            if once:
                server.ways[self.path] = "gone"
            rest = data[start:]
            if way == "gone":
                rest = b""
            self.wfile.write(rest[:each] if way.startswith("breaks off") or way in ("no tag", "no ranges") else rest)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()

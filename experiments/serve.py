"""Look around in a generated panorama in a browser: the page of `python -m experiments.view --serve`.

GET / is the page, and GET /view?seed=0&yaw=90&pitch=0&fov=75&height=480&width=640 a view, as a BMP, which
takes less time to pack than a PNG. Its headers say how many milliseconds the view took, and of each micro
patch, row by row, whether it is not made (0), was made before (1), or was made for this view (2).

Only programs on this computer can connect. Requests for another Host name are refused, or a page from
elsewhere could let its own name point here and read the answers (DNS rebinding).
"""

import functools
import io
import json
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

from PIL import Image

from data import UserError

AT_ONCE = 4  # requests for a view at the same time; more are refused
KEPT = 16  # seeds whose micro patches are kept
LIMITS = dict(seed=(0, 2**53 - 1), yaw=(-1e6, 1e6), pitch=(-90.0, 90.0), fov=(1.0, 179.0))
LIMITS |= dict(height=(16, 1080), width=(16, 1920))  # whole numbers in JavaScript end at 2**53
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>COCO-GAN: a panorama by parts</title>
<style>
body { background: #222; color: #ddd; font: 16px sans-serif; text-align: center }
#view { max-width: 100%; cursor: grab; touch-action: none }
</style>
<canvas id="view"></canvas>
<p>Drag to turn the head, use the wheel for the field of view. <button id="next">Next seed</button></p>
<p id="line"></p>
<canvas id="map"></canvas>
<p>Micro patches of the panorama: <span style="color: #fa4">made for this view</span>,
<span style="color: #6ae">made before</span>, <span style="color: #999">not yet made</span></p>
<script>
"use strict";
const {rows, columns, ...head} = START, cell = Math.ceil(480 / columns), colours = ["#555", "#6ae", "#fa4"];
const [view, map, line, next] = ["view", "map", "line", "next"].map(id => document.getElementById(id));
let busy = false, moved = false;
[view.width, view.height, map.width, map.height] = [head.width, head.height, columns * cell, rows * cell];

async function ask() {
  const [yaw, pitch, fov] = [head.yaw, head.pitch, head.fov].map(x => x.toFixed(2));
  const answer = await fetch("view?" + new URLSearchParams({...head, yaw, pitch, fov}));
  if (!answer.ok) return `Refused: ${answer.status} ${answer.statusText}`;
  view.getContext("2d").drawImage(await createImageBitmap(await answer.blob()), 0, 0);
  const patches = answer.headers.get("X-Patches"), pen = map.getContext("2d");
  const made = patches.replace(/0/g, "").length, of = patches.length;
  [...patches].forEach((state, k) => {
    pen.fillStyle = colours[state];
    pen.fillRect(k % columns * cell, Math.floor(k / columns) * cell, cell - 1, cell - 1);
  });
  return `Seed ${head.seed}, yaw ${yaw}°, pitch ${pitch}°, field of view ${fov}°: `
    + `${answer.headers.get("X-Milliseconds")} ms, ${made} of ${of} micro patches made`;
}

async function look() {  // one request at a time; of the moves in the meantime only the last one counts
  moved = true;
  if (busy) return;
  for (busy = true; moved;) {
    moved = false;
    line.textContent = await ask().catch(error => `The server does not answer: ${error.message}`);
  }
  busy = false;
}

view.onpointerdown = event => view.setPointerCapture(event.pointerId);
view.onpointermove = event => {
  if (!event.buttons) return;
  const degrees = head.fov / view.clientWidth;  // per pixel
  head.yaw = (head.yaw - event.movementX * degrees + 360) % 360;
  head.pitch = Math.min(90, Math.max(-90, head.pitch + event.movementY * degrees));
  look();
};
view.addEventListener("wheel", event => {
  event.preventDefault();
  head.fov = Math.min(150, Math.max(10, head.fov * Math.exp(event.deltaY / 1000)));
  look();
}, {passive: false});
next.onclick = () => { head.seed++; look(); };
look();
</script>
"""


def check(name: str, value) -> int | float:
    """The value, text or number, as a number within LIMITS. Raises: UserError."""
    low, high = LIMITS[name]
    try:
        number = type(low)(value)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise UserError(f"{name} {value!a:.40} is out of range; give {low} to {high}")
    return number


class Server(ThreadingHTTPServer):
    """Args: make_scene(seed): a Scene, which keeps its patches; look(scene, yaw, pitch, fov, height, width):
    a view of it; start: of the first view, in the order of LIMITS; port: 0 for a free one."""

    def __init__(self, make_scene, look, start: tuple, port: int):
        start = {name: check(name, value) for name, value in zip(LIMITS, start)}
        self.scene_of, self.look = functools.lru_cache(KEPT)(make_scene), look
        config = self.scene_of(start["seed"]).G.config
        self.page = PAGE.replace("START", json.dumps(start | dict(rows=config.R, columns=config.K)))
        self.model, self.slots = threading.Lock(), threading.BoundedSemaphore(AT_ONCE)
        super().__init__(("127.0.0.1", port), Handler)
        port = f":{self.server_port}".removesuffix(":80")  # a browser leaves out 80
        self.hosts = "127.0.0.1" + port, "localhost" + port

    def view(self, seed, *head) -> tuple[bytes, dict[str, str]]:
        """A view as a file, and its headers. Call it with the lock `model`: on return it frees tensors."""
        started, scene = time.perf_counter(), self.scene_of(seed)
        before = scene.is_made.int()
        picture = self.look(scene, *head)
        ms, made = 1000 * (time.perf_counter() - started), scene.is_made.int()
        patches = "".join(map(str, (2 * made - before).flatten().tolist()))
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "BMP")
        return file.getvalue(), {"X-Milliseconds": f"{ms:.1f}", "X-Patches": patches}

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a browser may close a connection whenever it likes
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds without a byte, after which a connection is closed

    def do_GET(self):
        hosts, (path, _, query) = self.headers.get_all("Host", []), self.path.partition("?")
        if len(hosts) != 1:
            return self.send_error(HTTPStatus.BAD_REQUEST, "give one Host")
        if hosts[0].lower() not in self.server.hosts:
            return self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "this is another Host")
        if path == "/":
            page = self.server.page.encode()
            return self.answer("text/html; charset=utf-8", page, {"Content-Security-Policy": POLICY})
        if path != "/view":
            return self.send_error(HTTPStatus.NOT_FOUND)
        pairs = parse_qsl(query)
        try:
            if sorted(name for name, _ in pairs) != sorted(LIMITS):
                raise UserError(f"give each of these once: {', '.join(LIMITS)}")
            asked = [check(name, dict(pairs)[name]) for name in LIMITS]
        except UserError as error:
            return self.send_error(HTTPStatus.BAD_REQUEST, str(error))
        if not self.server.slots.acquire(blocking=False):
            return self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "busy with other views; try again")
        try:
            with self.server.model:
                picture, headers = self.server.view(*asked)
        finally:
            self.server.slots.release()
        self.answer("image/bmp", picture, headers)

    def answer(self, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(HTTPStatus.OK)
        headers |= {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(make_scene, look, start: tuple, port: int) -> None:
    """Serve the page until Ctrl-C. Args: as of Server. Raises: UserError; KeyboardInterrupt in the end."""
    try:
        server = Server(make_scene, look, start, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} is not available: {error}; leave it out for a free one") from error
    with server:
        try:
            print(f"http://127.0.0.1:{server.server_port}/ shows the view; Ctrl-C ends it", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            server.model.acquire()  # for good: no thread may be within PyTorch when Python ends
            print("stopped")
            raise

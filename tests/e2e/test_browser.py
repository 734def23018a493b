"""A web page of another origin, in a real browser, tries to reach the model in every way that a page has."""

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.launched import Launcher, chat
from support.waiting import free_port

from mlx_launcher.demo import GREETING

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: chromium, chromium-browser or google-chrome")

# What arrives at a server that lets everybody in: without these the test would prove nothing.
ARRIVES = {
    ("GET", "/v1/models"),
    ("GET", "/v1/models?script"),
    ("GET", "/v1/models?image"),
    ("GET", "/v1/models?events"),
    ("GET", "/v1/models?socket"),
    ("OPTIONS", "/v1/chat/completions"),
    ("POST", "/v1/chat/completions?json"),
    ("POST", "/v1/chat/completions?simple"),
    ("POST", "/v1/chat/completions?blind"),
    ("POST", "/v1/chat/completions?beacon"),
    ("POST", "/v1/chat/completions?form"),
}

PAGE = """<!doctype html><title>a page</title><body><script>
const target = new URLSearchParams(location.search).get("target");
const models = `http://${target}/v1/models`, chat = `http://${target}/v1/chat/completions`;
const body = JSON.stringify({messages: [{role: "user", content: "Hi"}], max_tokens: 3});
const read = async (url, how) => (await fetch(url, how)).text();
const element = (name, url) => new Promise((done) => {
  const it = document.createElement(name);
  it.onload = () => done("loaded");
  it.onerror = () => done("");
  it.src = url;
  document.body.append(it);
});
const form = () => new Promise((done) => {
  const frame = document.createElement("iframe"), form = document.createElement("form");
  frame.name = "frame";
  Object.assign(form, {method: "POST", action: chat + "?form", enctype: "text/plain", target: "frame"});
  const field = document.createElement("input");
  [field.name, field.value] = [body.slice(0, -1) + ',"user":"', '"}'];
  form.append(field);
  document.body.append(frame, form);
  frame.onload = () => { try { done(frame.contentDocument.body.innerText); } catch { done(""); } };
  form.submit();
});
const attempts = {
  fetch: () => read(models),
  json: () => read(chat + "?json", {method: "POST", headers: {"Content-Type": "application/json"}, body}),
  simple: () => read(chat + "?simple", {method: "POST", body}),
  blind: () => read(chat + "?blind", {method: "POST", mode: "no-cors", body}),
  beacon: async () => { navigator.sendBeacon(chat + "?beacon", body); return ""; },
  form,
  events: () => new Promise((done) => {
    const events = new EventSource(models + "?events");
    events.onmessage = (event) => done(event.data);
    events.onerror = () => { events.close(); done(""); };
  }),
  socket: () => new Promise((done) => {
    const socket = new WebSocket(`ws://${target}/v1/models?socket`);
    socket.onopen = () => done("open");
    socket.onerror = () => done("");
  }),
  script: () => element("script", models + "?script"),
  image: () => element("img", models + "?image"),
};
(async () => {
  const got = {};
  for (const [name, attempt] of Object.entries(attempts)) {
    const patience = new Promise((done) => setTimeout(() => done(""), 5000));
    got[name] = await Promise.race([attempt().catch(() => ""), patience]);
  }
  await fetch("/report", {method: "POST", body: JSON.stringify(got)});
})();
</script>"""


class Site(BaseHTTPRequestHandler):
    """The page, and beside it a server that lets every page in."""

    reports: "queue.SimpleQueue[dict[str, str]]"
    arrived: set[tuple[str, str]]

    def do_GET(self) -> None:
        self._answer(PAGE.encode() if self.path.startswith("/page") else b'{"open": true}')

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/report":
            self.reports.put(json.loads(raw))
        self._answer(b'{"open": true}')

    def do_OPTIONS(self) -> None:
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.arrived.add((self.command, self.path if self.command != "OPTIONS" else self.path.partition("?")[0]))
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/json")
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def site() -> Iterator[ThreadingHTTPServer]:
    Site.reports, Site.arrived = queue.SimpleQueue(), set()
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def browser(profile: Path, *arguments: str) -> list[str]:
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    return [str(BROWSER), *quiet, "--no-proxy-server", f"--user-data-dir={profile}", *arguments]


def visit(site: ThreadingHTTPServer, profile: Path, target: str) -> dict[str, str]:
    """What the page could read of the target, by attempt; "" for nothing."""
    url = f"http://127.0.0.1:{site.server_port}/page?target={target}"
    process = subprocess.Popen(browser(profile, url), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return Site.reports.get(timeout=90)
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("backend", ["mlx", "mlx-legacy"])
def test_a_page_reads_nothing_and_has_nothing_generated(
    launcher: Launcher, site: ThreadingHTTPServer, tmp_path: Path, backend: str
) -> None:
    open_to_all = visit(site, tmp_path / "profile", f"127.0.0.1:{site.server_port}")
    assert {name for name, text in open_to_all.items() if text} >= {"fetch", "json", "simple", "form"}
    assert visit(site, tmp_path / "profile", f"localhost:{site.server_port}")["simple"] == '{"open": true}'
    assert Site.arrived >= ARRIVES

    launcher.start("--demo", f"--mode={backend}")
    for target in (f"127.0.0.1:{launcher.port}", f"localhost:{launcher.port}"):
        got = visit(site, tmp_path / "profile", target)
        assert set(got) == set(open_to_all)
        assert {name: text for name, text in got.items() if text} == {}
    assert launcher.status()["activity"]["requests"] == 0
    assert chat(launcher.port, "Hi").text == GREETING


def test_a_name_that_leads_here_shows_nothing(launcher: Launcher, tmp_path: Path) -> None:
    """As after a DNS rebinding: the browser takes this server for evil.example."""
    launcher.start("--demo")
    url = f"http://evil.example:{launcher.port}/v1/models"
    rules = "--host-resolver-rules=MAP evil.example 127.0.0.1"
    dump = browser(tmp_path / "profile", rules, "--dump-dom", "--timeout=20000", url)
    shown = subprocess.run(dump, capture_output=True, text=True, timeout=90, check=False).stdout
    assert "does not answer to the host" in shown
    assert "owned_by" not in shown

"""`distaff report --serve`: the page of runs that train, for the browser of this machine only."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distaff import cli
from distaff.errors import ConfigError
from distaff.report import server
from distaff.report.server import LivePage, make_server

HEAD = '<script type="application/json" id="facts">'


def make(version: str, *rows: dict[str, Any], status: str = "running") -> Path:
    path = Path("runs/digits").absolute() / version
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"options": {"name": "digits"}}))
    (path / "status.json").write_text(json.dumps({"status": status}))
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def row(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "time": 0.0, "val/loss": 1 / step}


def facts_of(content: bytes) -> dict[str, Any]:
    return json.loads(content.decode().split(HEAD)[1].split("</script>")[0])


def page_of(*paths: Path) -> tuple[LivePage, list[float]]:
    """Returns a live page, and the list that has its time."""
    now = [0.0]
    return LivePage(lambda: paths, 10_000, clock=lambda: now[0]), now


@contextmanager
def served(live: LivePage) -> Generator[int]:
    with make_server(live, 0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield made.server_port
        finally:
            made.shutdown()
            thread.join()


def ask(
    port: int, method: str = "GET", path: str = "/", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def test_page_follows_its_runs():
    live, _ = page_of(make("0001", row(1)))
    with served(live) as port:
        answer, content = ask(port)
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "connect-src 'self'" in content.decode()
        facts = facts_of(content)
        assert answer.headers["ETag"] == f'"{facts["version"]}"'
        head, nothing = ask(port, "HEAD")
        assert (head.headers["ETag"], nothing) == (answer.headers["ETag"], b"")
        make("0001", row(2))
        again, content = ask(port)
        assert again.headers["ETag"] != answer.headers["ETag"]
        assert facts_of(content)["runs"][0]["curves"]["val/loss"]["value"] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{}", 200),
        ("LOCALHOST:{}", 200),
        ("evil.example:{}", 403),
        ("127.0.0.1.evil.example:{}", 403),
        ("127.0.0.1", 403),
        ("127.0.0.1:1", 403),
    ],
)
def test_other_hosts_are_rejected(host, status):
    live, _ = page_of(make("0001", row(1)))
    with served(live) as port:
        answer, content = ask(port, Host=host.format(port))
    assert answer.status == status
    assert (b"runs" in content) == (status == 200)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/?again", 200),
        ("GET", "/runs/digits/0001/config.json", 404),
        ("GET", "/../config.json", 404),
        ("POST", "/", 501),
        ("PUT", "/", 501),
        ("OPTIONS", "/", 501),
    ],
)
def test_only_the_page_is_served(method, path, status):
    live, _ = page_of(make("0001", row(1)))
    with served(live) as port:
        answer, _ = ask(port, method, path)
    assert answer.status == status
    assert answer.headers["Access-Control-Allow-Origin"] is None


def test_run_that_is_removed_or_half_written_is_named(monkeypatch):
    first, second = make("0001", row(1)), make("0002", row(1))
    live, _ = page_of(first, second)
    assert len(facts_of(live.latest()[1])["runs"]) == 2
    with (first / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "epo')
    shutil.rmtree(second)
    facts = facts_of(live.latest()[1])
    assert [run["path"][-4:] for run in facts["runs"]] == ["0001"]
    assert facts["unreadable"][0]["path"] == "runs/digits/0002"
    shutil.rmtree(first)
    facts = facts_of(live.latest()[1])
    assert (facts["runs"], len(facts["unreadable"])) == ([], 2)
    make("0001", row(1))
    assert len(facts_of(live.latest()[1])["runs"]) == 1


def test_page_that_takes_long_is_made_less_often(monkeypatch):
    live, now = page_of(make("0001", row(1)))
    made = []

    def slow(*args: Any) -> dict[str, Any]:
        made.append(now[0])
        now[0] += 2.0
        return {"runs": [], "differs": []}

    monkeypatch.setattr(server, "gather_present", slow)
    live.latest()
    for step in range(2, 22):
        make("0001", row(step))
        live.latest()
        now[0] += 1.0
    assert made == [0.0, 12.0]


def test_wrong_options_are_errors(capsys):
    make("0001", row(1))
    for words, part in (
        (("runs", "--serve", "--out", "a.html"), "--serve writes no file"),
        (("runs", "--port", "8000"), "Add --serve"),
        (("runs", "--serve", "--port", "99999"), "Pass --port 0"),
        (("--serve",), "at least one run"),
    ):
        assert cli.main(("report", *words)) == 2
        assert part in capsys.readouterr().err
    assert cli.main(("report", "gone", "--serve")) == 1
    with (
        make_server(page_of()[0], 0) as taken,
        pytest.raises(ConfigError, match=r"in use.*Pass --port 0"),
    ):
        make_server(page_of()[0], taken.server_port)


def test_ctrl_c_ends_it(monkeypatch, capsys):
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    make("0001", row(1))
    make("0002", row(1))
    monkeypatch.setattr(server._PageServer, "serve_forever", interrupted)
    assert cli.main(("report", "runs", "--serve")) == 0
    out = capsys.readouterr().out
    assert out.startswith("http://127.0.0.1:")
    assert "/: 2 runs\n" in out

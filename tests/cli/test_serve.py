"""`pore serve`: what it refuses before it serves, and that signals end it when all is answered."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.command_line import run
from helpers.serving import CHAT, body, call, data_url, picture, until
from pore.cli.serve import Options, _limits, _served
from pore.errors import InputError
from pore.methods.registry import methods


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--guide", "embedded"), "--guide is for --method SGL, not for FastV"),
        (("--unpruned", "--keep", "4"), "With --unpruned there is no method"),
        (("--unpruned", "--average"), "With --unpruned there is no method"),
    ],
)
def test_contradictions(model: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in run("serve", model, *arguments, code=1).output


def test_without_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "pore.serving.running", raising=False)
    found = run("serve", model, code=1)
    assert "pip install 'pore-vlm[serve]'" in " ".join(found.output.split())
    assert "uvicorn" in found.output


def test_the_method_at_any_budget(model: Path, profile: Path) -> None:
    given: dict[str, Any] = {"reweight": str(profile), "layer": 3, "settings": ["normalize=visual"]}
    one = _served(Options(str(model), keep="4", allow=["layer", "normalize"], **given, name="tiny"))
    assert (one.name, one.limits) == ("tiny", _limits(Options()).of(1024))
    for keep in (None, 2, 0.5):
        made: Any = one.pruner(keep)
        assert (made.keep, made.layer, made.normalize) == (keep or 4, 3, "visual")
        assert made.reweight is not None
    assert _served(Options(str(model), unpruned=True)).pruner(None) is None
    guided: Any = _served(Options(str(model), method="sgl")).pruner(0.5)
    assert methods()["SGL"].guided
    assert guided.guide.itself


@pytest.mark.parametrize("command", [("serve",), ("ui", "-m")])
def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve: .ci/serve runs this")

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("pore.data.loading.load_model", loaded)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for host, reason in (("127.0.0.1", "already in use"), ("192.0.2.1", ""), ("no host", "")):
            found = run(*command, model, "--port", port, "--host", host, code=1)
            said = " ".join(found.output.split())
            assert f"Nothing can listen at {host}:{port}: " in said
            assert reason in said
            assert "Serving" not in said
            assert "Choose another --port" in said


def test_two_that_start_at_once_do_not_share_a_port() -> None:
    """Both take the address before they listen; the slower one says so."""
    pytest.importorskip("uvicorn", reason="needs the extra serve: .ci/serve runs this")
    pytest.importorskip("starlette", reason="needs the extra serve: .ci/serve runs this")
    from pore.serving.running import Server, listening

    _, port = address()
    with listening("127.0.0.1", port) as one, listening("127.0.0.1", port) as other:
        one[0].listen()
        idle: Any = SimpleNamespace(stopping=False, idle=True)
        with pytest.raises(InputError, match=f"Nothing can listen at 127.0.0.1:{port}"):
            Server(idle, other).run()


def address() -> tuple[str, int]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return f"http://127.0.0.1:{port}", port


def healthy(at: str) -> bool:
    try:
        return call(at, "/health").status == 200
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it(model: Path, name: str) -> None:
    pytest.importorskip("openai", reason="needs the extra serve: .ci/serve runs this")
    pytest.importorskip("fastapi", reason="needs the extra serve: .ci/serve runs this")
    pytest.importorskip("uvicorn", reason="needs the extra serve: .ci/serve runs this")
    at, port = address()
    command = [sys.executable, "-m", "pore", "serve", str(model), "--keep", "4", "--port", port]
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE) as process:
        try:
            until(lambda: healthy(at) or process.poll() is not None)
            reply = call(at, CHAT, body(data_url(picture())))
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port)) as half_sent:
                half_sent.sendall(head.encode() + b'{"mess')
                process.send_signal(getattr(signal, name))
                printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert reply.status == 200
    assert process.returncode == 0
    assert at in "".join(printed.decode().split())

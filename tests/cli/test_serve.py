"""`pore serve`: what it refuses before it serves, and that signals end it when all is answered."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import run
from helpers.serving import CHAT, body, call, data_url, picture, until
from pore.cli.serve import Options, _limits, _served
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
            process.send_signal(getattr(signal, name))
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert reply.status == 200
    assert process.returncode == 0
    assert at in "".join(printed.decode().split())

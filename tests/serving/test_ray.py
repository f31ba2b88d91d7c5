"""The example of docs/ray_serve.py: two replicas, whose batches answer what `generate` answers."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.checkpoint import save_checkpoint
from helpers.serving import CHAT, body, call, data_url, picture
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.data.samples import Sample

ray = pytest.importorskip("ray", reason="needs Ray: .ci/ray runs this")
serve = pytest.importorskip("ray.serve", reason="needs Ray Serve: .ci/ray runs this")

EXAMPLE = Path(__file__).parents[2] / "docs" / "ray_serve.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def address(checkpoint: str) -> Iterator[str]:
    spec = importlib.util.spec_from_file_location("ray_serve", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sys.modules["ray_serve"] = example
    ray.cloudpickle.register_pickle_by_value(example)  # workers do not know this folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(example.Pruned.bind(checkpoint), route_prefix=CHAT)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    del sys.modules["ray_serve"]


@pytest.mark.slow
def test_replicas_answer_in_batches(address: str, checkpoint: str) -> None:
    (application,) = serve.status().applications.values()
    assert application.deployments["Pruned"].replica_states == {"RUNNING": 2}
    model, processor = load_model(checkpoint, device="cpu")
    image = picture()
    budgets = [(0.25, 4), (2, 2), (1, 1), (1.0, 16)]
    asked = [(f"w{6 + i % 5} w20", *budgets[i // 8]) for i in range(32)]

    def ask(one: tuple[str, int | float, int]) -> Any:
        question, keep, _ = one
        more = {} if keep == 0.25 else {"keep": keep}
        return call(address, CHAT, body(data_url(image), question=question, **more))

    with ThreadPoolExecutor(len(asked)) as clients:
        replies = list(clients.map(ask, asked))
    for (question, keep, kept), reply in zip(asked, replies, strict=True):
        inputs = build_inputs(processor, [Sample("one", image, question)])
        with pore.FastV(keep=keep)(model):
            tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert reply.answer == processor.decode(new, skip_special_tokens=True).strip()
        assert reply.json["pore"]["visual_tokens_kept"] == kept
    assert max(reply.json["pore"]["answered_together"] for reply in replies) > 1
    for more in ({}, {"max_tokens": None}, {"max_tokens": 7}, {"temperature": 1e-300}):
        assert call(address, CHAT, body(question="w7 w8", **more)).status == 200


@pytest.mark.slow
def test_bad_requests_do_not_harm_others(address: str) -> None:
    url = data_url(picture())
    given = [body(url, keep=16, max_tokens=None), body(url, keep=17)] * 4
    with ThreadPoolExecutor(len(given)) as clients:
        replies = list(clients.map(lambda one: call(address, CHAT, one), given))
    assert [reply.status for reply in replies] == [200, 400] * 4
    assert "asks for more visual tokens" in replies[1].reason
    for bad, reason in (
        (body("data:image/png;base64,AAAA"), "cannot be read"),
        (body(url, stream=True), "not taken here"),
        (b"{", "cannot be read as JSON"),
        (body(url, question="w6 " * 2000), "takes 1024 in all"),
        (body(url, question="w6 " * 30_000), "more than 65536 characters"),
        (body(url, top_p=0.5), "top_p is for sampling"),
    ):
        reply = call(address, CHAT, bad)
        assert reply.status == 400
        assert reason in reply.reason
    assert call(address, CHAT, body(url, model="other")).status == 404

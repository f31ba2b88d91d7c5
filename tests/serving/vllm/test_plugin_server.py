"""vLLM servers with the plug-in: one that a method prunes, one that requests tell what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import pore
from helpers.chats import picture, user
from helpers.vllm_engines import CHUNK, LONGEST, Server, generated
from helpers.vllm_qwen import save_qwen, token_side
from pore.data.loading import load_model
from pore.data.prompts import Prompt, prompt_inputs, render_messages
from pore.embedded import embedded_model
from pore.engine.stages import Selection, Stage, View
from pore.serving.reencoding import Ranker
from pore.serving.requests import Limits, conversation
from pore.serving.vllm.client import VLLMClient

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")
openai = pytest.importorskip("openai")

VISIONZIP = pore.VisionZip(keep=16)
FASTV = pore.FastV(keep=5, layer=2)
GREEDY: dict[str, Any] = {"model": "served", "max_tokens": LONGEST, "temperature": 0}
MORE = {"ignore_eos": True, "return_token_ids": True}
WITH_START = {**MORE, "add_special_tokens": True}
"""As the embedded model's tokenizer is used elsewhere; vLLM leaves the start to the template."""
OPTIONS = ["--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "8"]
OPTIONS += ["--enable-prompt-tokens-details"]


class Served(NamedTuple):
    path: str
    server: Server
    client: Any
    parts: tuple[Any, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[list[Served]]:
    """The two servers, which start at the same time."""
    qwen = save_qwen(folder / "qwen", "Qwen3VL")
    settings = {
        str(embedded_model()): ("Llava", {"method": "VisionZip", "keep": 16}, []),
        str(qwen): ("Qwen3VL", {"by_request": True}, ["--trust-request-mm-kwargs"]),
    }
    with ExitStack() as stack:
        servers = []
        for path, (kind, pruning, flags) in settings.items():
            overrides = {"architectures": [f"Pore{kind}ForConditionalGeneration"], "pore": pruning}
            more = ["--hf-overrides", json.dumps(overrides), *flags, *OPTIONS]
            servers.append(Server(Path(path), folder / f"{kind}.txt", *more))
            stack.push(servers[-1])
        for server in servers:
            server.wait()
        yield [
            Served(
                path,
                server,
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0),
                load_model(path),
            )
            for server, path in zip(servers, settings, strict=True)
        ]


@pytest.fixture(scope="module")
def llava(both: list[Served]) -> Served:
    return both[0]


@pytest.fixture(scope="module")
def qwen(both: list[Served]) -> Served:
    return both[1]


@pytest.fixture(scope="module")
def client(qwen: Served) -> VLLMClient:
    return VLLMClient(qwen.client, Ranker.load(qwen.path, FASTV))


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    return [s for s, _ in zip(pore.load_samples("embedded:test"), range(10), strict=False)]


def tokens(answer: Any) -> list[int]:
    return list(answer.choices[0].token_ids)


def in_transformers(served: Served, pruner: Any, text: str, *images: Any) -> list[int]:
    """The answer of transformers to the same prompt, pruned there; None is unpruned."""
    model, processor = served.parts
    read, _ = conversation([user(text, *images)], Limits())
    inputs = prompt_inputs(processor, [Prompt("asked", render_messages(processor, read), images)])
    if pruner is None:
        return generated(model, **inputs)[0]
    with pruner(model):
        return generated(model, **inputs)[0]


class Given(pore.Pruner):
    """Keeps what it is told of every image, before the first layer."""

    def __init__(self, kept: Sequence[Sequence[int]]) -> None:
        self.kept = kept

    def stages(self) -> list[Stage]:
        return [Stage(0, self._rule)]

    def _rule(self, view: View) -> Selection:
        raster = view.layout.raster
        rows = zip(raster, self.kept, strict=True)
        chosen = torch.stack([torch.isin(row, torch.tensor(kept)) for row, kept in rows])
        return Selection(chosen & view.layout.valid)


# -- a method prunes ------------------------------------------------------------------------------


def test_log_and_metrics_say_what_is_pruned(both: list[Served]) -> None:
    llava, qwen = both
    assert f"pore prunes every image: {VISIONZIP!r}" in llava.server.log()
    assert (
        f'pore_info{{method="VisionZip",model="served",settings="{VISIONZIP!r}"}} 1.0'
        in llava.server.metrics()
    )
    assert "pore keeps of every image what its request says" in qwen.server.log()
    assert 'pore_info{method="by request",model="served",settings=""} 1.0' in qwen.server.metrics()


def test_many_at_once_of_which_some_go_away(llava: Served, samples: Any) -> None:
    """A hundred requests from sixteen threads, prompts in chunks that cut their images."""
    cases = [(sample.question, sample.load_image()) for sample in samples]
    expected = [in_transformers(llava, VISIONZIP, *case) for case in cases]

    def ask(number: int) -> Any:
        asked = {"messages": [user(*cases[number % len(cases)])], "extra_body": WITH_START}
        if number % 10 == 9:
            stream = llava.client.chat.completions.create(
                **asked, model="served", max_tokens=300, stream=True
            )
            next(iter(stream))
            stream.close()
            return None
        return llava.client.chat.completions.create(**asked, **GREEDY)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(110)))
    for number, answer in enumerate(answers):
        if answer is not None:
            assert tokens(answer) == expected[number % len(cases)]
            assert CHUNK < answer.usage.prompt_tokens < 2 * CHUNK
    assert sum(answer is not None for answer in answers) == 99
    assert llava.server.alive()


def test_a_prompt_that_was_there_before_is_cached(llava: Served) -> None:
    case = ("What is in the middle of this picture? " * 3, picture(11))
    first, again = (
        llava.client.chat.completions.create(
            messages=[user(*case)], **GREEDY, extra_body=WITH_START
        )
        for _ in range(2)
    )
    assert again.usage.prompt_tokens_details.cached_tokens >= 32
    assert tokens(first) == tokens(again) == in_transformers(llava, VISIONZIP, *case)


def test_indices_are_not_taken_where_they_are_not_asked_for(llava: Served, samples: Any) -> None:
    kept = [{"grid": [2, 2], "kept": [0]}]
    asked = [user("What?", samples[0].load_image())]
    with pytest.raises(openai.BadRequestError, match="disabled by default"):
        llava.client.chat.completions.create(
            messages=asked, **GREEDY, extra_body={"mm_processor_kwargs": {"pore_kept": kept}}
        )
    assert llava.server.alive()


# -- requests say what is kept --------------------------------------------------------------------


def sized(seed: int, rows: int, columns: int) -> Any:
    side = token_side("Qwen3VL")
    return picture(seed).resize((side * columns, side * rows))


CASES = [
    ("w1 w2 w3 w4 w5", sized(1, 4, 6)),
    ("w6 w7", sized(2, 5, 3), sized(3, 2, 8)),
    ("w8 w9 w10", sized(4, 6, 6)),
    ("w11 w12", sized(2, 5, 3)),
]


def test_kept_tokens_have_their_positions(qwen: Served, client: VLLMClient) -> None:
    """FastV ranks at the client; the server answers as transformers with the same tokens kept."""
    prompts = []
    for case in CASES:
        sent = client.pruned([user(*case)])
        kept = [one["kept"] for one in sent["extra_body"]["mm_processor_kwargs"]["pore_kept"]]
        prompts.append((case, in_transformers(qwen, Given(kept), *case)))

    def ask(number: int) -> list[int]:
        case, _ = prompts[number % len(prompts)]
        made = client.create(messages=[user(*case)], **GREEDY, extra_body=MORE)
        return tokens(made)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(24)))
    assert found == [expected for _, expected in prompts] * 6
    whole = [in_transformers(qwen, None, *case) for case in CASES]
    assert sum(one != other for one, (_, other) in zip(whole, prompts, strict=True)) >= 3


def test_one_picture_twice_with_other_indices(qwen: Served) -> None:
    """Neither cache, of the processor or of the tower, takes one for the other."""
    image = sized(7, 4, 4)
    for kept in ([[0, 5, 9], [2, 3, 4, 15]], [[2, 3, 4, 15], [0, 5, 9]], [[1], list(range(16))]):
        chosen = [{"grid": [4, 4], "kept": one} for one in kept]
        body = {**MORE, "mm_processor_kwargs": {"pore_kept": chosen}}
        answer = qwen.client.chat.completions.create(
            messages=[user("w1 w2", image, image)], **GREEDY, extra_body=body
        )
        assert tokens(answer) == in_transformers(qwen, Given(kept), "w1 w2", image, image)


def test_what_says_nothing_is_whole(qwen: Served) -> None:
    case = ("w3 w4", sized(8, 3, 4), sized(9, 4, 2))
    for said in (None, {"pore_kept": [None, None]}):
        body = {**MORE, **({} if said is None else {"mm_processor_kwargs": said})}
        answer = qwen.client.chat.completions.create(
            messages=[user(*case)], **GREEDY, extra_body=body
        )
        assert tokens(answer) == in_transformers(qwen, None, *case)
    for one in (0, 1):  # beside one that is pruned, in the same prompt and the same batch
        kept: list[list[int]] = [list(range(12)), list(range(8))]
        kept[one] = [1, 6]
        said = {"pore_kept": [None, None]}
        said["pore_kept"][one] = {"grid": [(3, 4), (4, 2)][one], "kept": [1, 6]}
        body = {**MORE, "mm_processor_kwargs": said}

        def ask(body: Any) -> Any:
            return qwen.client.chat.completions.create(
                messages=[user(*case)], **GREEDY, extra_body=body
            )

        with ThreadPoolExecutor(4) as pool:
            pruned, whole, again, plain = pool.map(ask, [body, MORE] * 2)
        assert tokens(pruned) == tokens(again) == in_transformers(qwen, Given(kept), *case)
        assert tokens(whole) == tokens(plain) == in_transformers(qwen, None, *case)
    text = qwen.client.chat.completions.create(messages=[user("w5")], **GREEDY, extra_body=MORE)
    assert tokens(text) == in_transformers(qwen, None, "w5")


@pytest.mark.parametrize(
    "said",
    [
        {"pore_kept": [{"grid": [4, 6], "kept": [0, 24]}]},
        {"pore_kept": [{"grid": [4, 6], "kept": [-1, 2]}]},
        {"pore_kept": [{"grid": [4, 6], "kept": [2, 1]}]},
        {"pore_kept": [{"grid": [4, 6], "kept": [1, 1]}]},
        {"pore_kept": [{"grid": [4, 6], "kept": []}]},
        {"pore_kept": [{"grid": [4, 6], "kept": [0.5]}]},
        {"pore_kept": [{"grid": [4, 6], "kept": "all"}]},
        {"pore_kept": [{"grid": [6, 4], "kept": [0, 1]}]},
        {"pore_kept": [{"grid": [40, 60], "kept": [2000]}]},
        {"pore_kept": [{"grid": [4, 6], "kept": [0]}] * 2},
        {"pore_kept": {"grid": [4, 6], "kept": [0]}},
        {"max_pixels": 100000},
    ],
    ids=json.dumps,
)
def test_what_is_wrong_is_refused_and_the_server_lives(qwen: Served, said: Any) -> None:
    asked = [user("w1 w2", sized(1, 4, 6))]
    with pytest.raises(openai.BadRequestError, match="pore_kept"):
        qwen.client.chat.completions.create(
            messages=asked, **GREEDY, extra_body={"mm_processor_kwargs": said}
        )
    assert qwen.server.alive()
    right = {**MORE, "mm_processor_kwargs": {"pore_kept": [{"grid": [4, 6], "kept": [3, 7]}]}}
    answer = qwen.client.chat.completions.create(messages=asked, **GREEDY, extra_body=right)
    assert len(tokens(answer)) == LONGEST


def test_a_client_of_those_that_goes_away(qwen: Served, client: VLLMClient) -> None:
    for _ in range(3):
        stream = client.create(
            messages=[user(*CASES[0])], model="served", max_tokens=300, stream=True
        )
        next(iter(stream))
        stream.close()
    assert qwen.server.alive()

"""Engines of vLLM on a CPU, and what they are compared with."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
LONGEST = 8
"""Tokens of an answer."""
CHUNK = 24
"""Tokens in one step of an engine: a prompt takes several, and its image is cut."""
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "block_size": 32,
    "max_num_batched_tokens": CHUNK,
}

MAY_NOT_BE_SET: dict[str, Any] = {
    "pore_kept": [{"grid": [2, 2], "kept": [0]}],
    "size": {"height": 32, "width": 32},
    "do_resize": False,
    "foo": {"a": {}},
}
"""What a request may not set where a method prunes: `mm_processor_kwargs`."""


def engine(path: str, **settings: Any) -> Any:
    """An engine in this process.

    Args:
        path: The checkpoint.
        **settings: Of `vllm.LLM`, beside or instead of `SETTINGS`.
    """
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM

    return LLM(model=path, **{**SETTINGS, **settings})


def answers(engine: Any, prompts: Sequence[dict[str, Any]]) -> list[Any]:
    """The greedy answers of an engine to some prompts, all at once: tokens, and cached ones.

    Returns:
        What vLLM returns for each.
    """
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=LONGEST, ignore_eos=True)
    found: list[Any] = engine.generate(prompts, greedy, use_tqdm=False)
    return found


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    """The tokens of answers."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def generated(model: Any, **inputs: Any) -> list[list[int]]:
    """The greedy answers of a model of transformers to a batch."""
    before = 0 if "input_ids" not in inputs else inputs["input_ids"].shape[1]
    with torch.inference_mode():
        made = model.generate(
            **inputs,
            max_new_tokens=LONGEST,
            min_new_tokens=LONGEST,
            do_sample=False,
            eos_token_id=None,
        )
    found: list[list[int]] = made[:, before:].tolist()
    return found


class Server:
    """A vLLM server of its own process.

    Args:
        path: The checkpoint; its folder's name is the model's.
        log: File for what it prints.
        *options: Further options of `vllm serve`.
    """

    def __init__(self, path: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(path), "--served-model-name", "served"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", "512", "--block-size", "32", *options]
        environment = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def wait(self, patience: float = 900) -> None:
        """Wait until it answers.

        Args:
            patience: Seconds.

        Raises:
            RuntimeError: It ended, or does not answer.
        """
        began = time.monotonic()
        while not self.alive():
            if self._process.poll() is not None or time.monotonic() - began > patience:
                raise RuntimeError(f"The server did not start:\n{self.log()[-3000:]}")
            time.sleep(0.5)

    def __enter__(self) -> Server:
        try:
            self.wait()
        except RuntimeError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def metrics(self) -> str:
        """What it shows to Prometheus."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text: bytes = answer.read()
        return text.decode()

    def alive(self) -> bool:
        """Whether the server says that it and its engine are well."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def save_for_stock(folder: Path) -> Path:
    """Write the embedded model as checkpoints on the hub name the weights of its tower.

    vLLM 0.32 alone does not know the names that transformers 5 gives them.
    """
    from pore.embedded import embedded_model

    shutil.copytree(embedded_model(), folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    tower = "vision_tower."
    renamed = {
        name.replace(tower, f"{tower}vision_model.")
        if f"{tower}vision_model" not in name
        else name: one
        for name, one in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

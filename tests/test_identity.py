"""Models and pictures are known by their content: every change of it is noticed, no other thing."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoint import save_checkpoint
from helpers.models import tiny_llava
from pore import identity
from pore._compat.weights import note_commit
from pore.identity import config_of, forget, names_of, picture_of, same_weights, weights_of

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BLOCK = 8 * identity._BLOCK


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Notes every time that weights are really read."""
    found: list[str | None] = []
    read = identity._read

    def noted(model: Any) -> str | None:
        found.append(read(model))
        return found[-1]

    monkeypatch.setattr(identity, "_read", noted)
    return found


class TestContent:
    """What is made of the bytes of one tensor."""

    @settings(max_examples=200)
    @given(st.binary(min_size=1, max_size=200), st.data())
    def test_every_bit_counts(self, content: bytes, data: Any) -> None:
        changed = bytearray(content)
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        changed[bit // 8] ^= 1 << bit % 8
        one, other = (torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in (content, changed))
        assert identity._content(one) != identity._content(other)
        assert identity._content(one) == identity._content(one.clone())

    @pytest.mark.parametrize(
        "place", [0, 7, 8, BLOCK - 1, BLOCK, 4 * BLOCK - 1, 4 * BLOCK, 9 * BLOCK + 4, -1]
    )
    def test_wherever_it_lies(self, place: int) -> None:
        data = torch.randint(0, 256, (9 * BLOCK + 13,), dtype=torch.uint8)
        before = identity._content(data)
        for bit in (1, 128):
            data[place] ^= bit
            assert identity._content(data) != before
            data[place] ^= bit
        assert identity._content(data) == before

    @settings(max_examples=100)
    @given(st.integers(2, 3000), st.integers(0, 2**32), st.data())
    def test_changes_that_sums_would_hide(self, n: int, seed: int, data: Any) -> None:
        words = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        i, j = data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True))
        swapped, negated, moved = words.clone(), words.clone(), words.clone()
        swapped[[i, j]] = swapped[[j, i]]
        negated[[i, j]] *= -1
        moved[i] += 1
        moved[j] -= 1
        found = {identity._content(each) for each in (words, swapped, negated, moved)}
        assert len(found) == 4

    @pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.bool, torch.complex64])
    def test_strides_and_places_do_not_count(self, dtype: torch.dtype) -> None:
        whole = torch.randn(7, 5, 3).mul(9).to(dtype)
        for view in (whole[1:, 1:], whole.transpose(0, 2), whole[..., 1], whole[3, 2, 1]):
            assert identity._content(view) == identity._content(view.clone().contiguous())

    @pytest.mark.parametrize("n", [0, 1, 5, 1 << 15, (3 << 15) + 77])
    def test_it_is_what_integers_modulo_two_to_the_64_give(self, n: int) -> None:
        words = np.random.default_rng(n).integers(0, 1 << 64, n, dtype=np.uint64)
        sums = []
        for block in np.split(words, range(1 << 15, n // (1 << 15) * (1 << 15) + 1, 1 << 15)):
            mixed = block + np.arange(1, len(block) + 1, dtype=np.uint64) * identity._KEY
            mixed *= np.uint64(identity._FIRST)
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(identity._SECOND)
            mixed ^= mixed >> np.uint64(29)
            sums.append(mixed.sum(dtype=np.uint64))
        data = torch.from_numpy(np.frombuffer(words.tobytes() + b"end", np.uint8).copy())
        assert identity._content(data) == np.array(sums, np.uint64).tobytes() + b"end"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("n", [0, 3, 1 << 15, (1 << 20) + 7, 100_000_003])
    def test_devices_agree(self, n: int) -> None:
        data = torch.randint(0, 256, (n,), dtype=torch.uint8)
        assert identity._content(data.cuda()) == identity._content(data)


class TestWeights:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.at_once(2)
    def test_one_changed_weight_anywhere(self, dtype: torch.dtype) -> None:
        model = tiny_llava(layers=2, dtype=dtype)
        before = weights_of(model)
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point():
                continue
            flat = tensor.detach().view(-1)
            old = flat[-1].clone()
            flat[-1] = (
                torch.nextafter(old.double(), torch.tensor(9e9).double())
                if (dtype == torch.float64)
                else old * 1.02 + 1e-3
            )
            saved = any(tensor is other for other in model.state_dict(keep_vars=True).values())
            assert (weights_of(model) != before) == saved
            flat[-1] = old
        assert weights_of(model) == before

    def test_names_and_order_count(self) -> None:
        model = tiny_llava()
        before = weights_of(model)
        layers = model.model.language_model.layers
        layers[0], layers[1] = layers[1], layers[0]
        assert weights_of(model) != before

    @pytest.mark.slow
    def test_the_same_weights_elsewhere(self, tmp_path: Path) -> None:
        model = tiny_llava(dtype=torch.float32)
        found = weights_of(model)
        again = type(model).from_pretrained(save_checkpoint(tmp_path / "a"), dtype=torch.float32)
        assert weights_of(copy.deepcopy(model)) == weights_of(again) == found
        assert weights_of(tiny_llava(dtype=torch.float32, attention="eager")) == found
        assert weights_of(torch.compile(model)) == found  # type: ignore[arg-type]
        assert weights_of(tiny_llava(dtype=torch.float32, seed=1)) != found

    def test_another_number_format_cannot_be_compared(self) -> None:
        one, other, half = (
            str(weights_of(tiny_llava(dtype=dtype, seed=seed)))
            for dtype, seed in ((torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0))
        )
        assert one.startswith("float32:")
        assert same_weights(one, one)
        assert not same_weights(one, other)
        assert same_weights(one, half)

    def test_tied_weights(self) -> None:
        model = tiny_llava()
        model.lm_head.weight = model.get_input_embeddings().weight
        tied = weights_of(model)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        assert weights_of(model) == tied

    def test_offloaded_weights(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        model = tiny_llava()
        found = weights_of(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert weights_of(model) == found
        assert all(p.device.type == "meta" for p in model.parameters())

    def test_weights_that_are_nowhere(self) -> None:
        assert weights_of(tiny_llava().to("meta")) is None

    def test_active_adapters(self) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        model = peft.get_peft_model(tiny_llava(), config, "one")
        model.add_adapter("two", config)
        first = weights_of(model)
        model.set_adapter("two")
        second = weights_of(model)
        with model.disable_adapter():
            assert len({first, second, weights_of(model)}) == 3
        model.set_adapter("one")
        assert weights_of(model) == first


class TestCache:
    def test_it_is_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found, model = reads(monkeypatch), tiny_llava()
        assert weights_of(model) == weights_of(model)
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
        weights_of(model)
        assert len(found) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: torch.no_grad()(layer.weight.mul_)(2),
            lambda layer: layer.load_state_dict({"weight": layer.weight * 2}),
            lambda layer: torch.nn.init.ones_(layer.weight),
            lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight.detach() * 2)),
            lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
        ],
        ids=["in place", "load_state_dict", "init", "replaced", "data replaced"],
    )
    def test_changes_are_noticed(self, change: Any) -> None:
        model = tiny_llava()
        before = weights_of(model)
        change(model.model.language_model.layers[1].mlp.down_proj)
        assert weights_of(model) != before

    def test_a_parameter_in_the_place_of_another(self) -> None:
        """Where memory is used again, neither address nor number of changes tell them apart."""
        model = tiny_llava()
        layer = model.model.language_model.layers[1].mlp.down_proj
        shape, seen = layer.weight.shape, {weights_of(model)}
        for value in range(1, 9):
            del layer.weight
            layer.weight = torch.nn.Parameter(torch.full(shape, float(value)).double())
            seen.add(weights_of(model))
        assert len(seen) == 9

    def test_what_pytorch_does_not_count(self) -> None:
        model = tiny_llava()
        before = weights_of(model)
        model.lm_head.weight.data[0, 0] += 1
        forget(model)
        assert weights_of(model) != before

    def test_inference_tensors_are_read_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = reads(monkeypatch)
        with torch.inference_mode():
            model = tiny_llava()
            before = weights_of(model)
            model.lm_head.weight[0, 0] += 1
            assert weights_of(model) != before
        assert len(found) == 2

    def test_models_are_let_go(self) -> None:
        model = tiny_llava()
        weights_of(model)
        held = weakref.ref(model)
        del model
        gc.collect()
        assert held() is None


class TestConfig:
    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("vision_feature_layer", lambda c: setattr(c, "vision_feature_layer", -1)),
            (
                "text_config.rope_parameters.rope_theta",
                lambda c: c.text_config.rope_parameters.update(rope_theta=5e5),
            ),
            ("text_config.rms_norm_eps", lambda c: setattr(c.text_config, "rms_norm_eps", 0.1)),
        ],
    )
    def test_what_decides_what_is_computed(self, name: str, change: Any) -> None:
        model = tiny_llava()
        before = config_of(model)
        change(model.config)
        after = config_of(model)
        assert {key for key in before if before[key] != after[key]} == {name}

    def test_what_does_not(self) -> None:
        model = tiny_llava(dtype=torch.float32)
        before = config_of(model)
        model.set_attn_implementation("eager")
        model.config.name_or_path = "some/where"
        model.config.text_config.use_cache = False
        model.config.text_config.pad_token_id = 7
        assert config_of(model.to(torch.bfloat16)) == before


class TestNames:
    def test_a_folder_by_its_last_part(self, tmp_path: Path) -> None:
        model = tiny_llava()
        assert names_of(model) == {"model": None, "revision": None}
        model.config.name_or_path = str(tmp_path / "a")
        (tmp_path / "a").mkdir()
        assert names_of(model) == {"model": "a", "revision": None}
        note_commit(model.config, "v2")
        assert names_of(copy.deepcopy(model))["revision"] == "v2"
        assert "v2" not in model.config.to_json_string()

    def test_a_folder_in_the_cache_of_the_hub(self, tmp_path: Path) -> None:
        folder = tmp_path / "models--me--tiny" / "snapshots" / "abc123"
        folder.mkdir(parents=True)
        model = tiny_llava()
        model.config.name_or_path = str(folder)
        assert names_of(model) == {"model": "me/tiny", "revision": "abc123"}

    @pytest.mark.slow  # imports all anew, in another process
    def test_the_revision_that_was_loaded(self, tmp_path: Path) -> None:
        """By branch, tag or commit: from a cache of the hub, as it is without a network."""
        repository, commits = tmp_path / "hub" / "models--me--tiny", ("1" * 40, "2" * 40)
        (repository / "refs").mkdir(parents=True)
        for name, commit in zip(("main", "v2"), commits, strict=True):
            (repository / "refs" / name).write_text(commit)
            save_checkpoint(repository / "snapshots" / commit)
        code = (
            "from pore.data.loading import load_model\n"
            "from pore.identity import names_of\n"
            f"for revision in (None, 'v2', {commits[1]!r}):\n"
            "    print(names_of(load_model('me/tiny', revision=revision)[0]))"
        )
        environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        expected = [{"model": "me/tiny", "revision": commits[i]} for i in (0, 1, 1)]
        assert done.stdout.splitlines() == list(map(str, expected)), done.stderr


class TestPictures:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)

    def changed(self) -> np.ndarray:
        other = self.pixels.copy()
        other[3, 2, 1] ^= 1
        return other

    @pytest.mark.parametrize("kind", ["path", "text", "bytes", "image", "opened"])
    def test_one_changed_pixel(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "picture.png"

        def made(pixels: np.ndarray) -> str:
            PIL.Image.fromarray(pixels).save(path)
            return picture_of(
                {
                    "path": lambda: path,
                    "text": lambda: str(path),
                    "bytes": path.read_bytes,
                    "image": lambda: PIL.Image.fromarray(pixels),
                    "opened": lambda: PIL.Image.open(path),
                }[kind]()
            )

        before = made(self.pixels)
        assert made(self.changed()) != before
        assert made(self.pixels) == before

    def test_where_a_file_lies_does_not_count(self, tmp_path: Path) -> None:
        one, other = tmp_path / "a.png", tmp_path / "b" / "c.png"
        other.parent.mkdir()
        PIL.Image.fromarray(self.pixels).save(one)
        other.write_bytes(one.read_bytes())
        assert picture_of(one) == picture_of(other) == picture_of(one.read_bytes())

    def test_size_palette_and_orientation_count(self) -> None:
        image = PIL.Image.fromarray(self.pixels)
        wide = PIL.Image.fromarray(self.pixels.reshape(5, 6, 3))
        turned = image.copy()
        turned.getexif()[0x0112] = 6
        one = PIL.Image.new("P", (5, 6), 0)
        one.putpalette([0, 0, 0, 255, 0, 0])
        other = one.copy()
        other.putpalette([0, 0, 9, 255, 0, 0])
        assert len({picture_of(each) for each in (image, wide, turned, one, other)}) == 5

    def test_what_cannot_be_read(self, tmp_path: Path) -> None:
        missing = picture_of(tmp_path / "missing.png")
        assert missing == picture_of("\0") == "unreadable"
        assert picture_of(tmp_path) == "unreadable"
        assert picture_of(None) == "none"
        os.mkfifo(tmp_path / "pipe.png")
        assert picture_of(tmp_path / "pipe.png") == "unreadable"  # and does not wait for a writer
        broken = PIL.Image.new("RGB", (2, 2))
        broken.close()
        assert picture_of(broken) == "unreadable"

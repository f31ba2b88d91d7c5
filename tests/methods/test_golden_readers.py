"""The checkers of golden files for videos, on valid files unlike those that we have."""

from __future__ import annotations

import pytest
import torch

from helpers.golden_files import Made, draw
from methods import (
    golden_evs,
    golden_flashvid,
    golden_framefusion,
    golden_holitom,
    golden_holov,
    golden_pact,
    golden_vidcom2,
)
from methods.test_golden import FOLDER, GoldenFile


def from_file(name: str) -> GoldenFile:
    return GoldenFile(FOLDER / f"{name}.safetensors")


def changed_in(file: GoldenFile, **tensors: torch.Tensor) -> Made:
    return Made(file.params, {**file.tensors, **tensors})


def test_evs_of_one_frame_and_seconds_that_are_no_whole_number() -> None:
    features, every = draw(0, 6, 4), torch.arange(18)
    for seconds, second in ((1.5, 1), (0.5, 0), (2, 2)):
        tensors = {
            "features": features.repeat(3, 1),
            "kept_indices": every,
            "retention_mask": torch.ones(18, dtype=torch.bool),
            "count": torch.tensor(18),
            "per_frame": torch.tensor([6, 6, 6]),
            "tokens": features.repeat(3, 1),
            "mrope": torch.stack([every // 6 * 4 * second, every // 3 % 2, every % 3], 1),
            "mrope_offset": torch.tensor(3),
            "dissimilarity": torch.zeros(2, 6),
        }
        params = {"T": 3, "grid_h": 2, "grid_w": 3, "q": 0.0, "tokens_per_second": 4.0}
        golden_evs.check(Made(params | {"second_per_grid": seconds}, tensors))
        one = {name: values[:6] for name, values in tensors.items() if values.dim()}
        one |= {"count": torch.tensor(6), "per_frame": torch.tensor([6])}
        one |= {"mrope_offset": torch.tensor(3), "dissimilarity": torch.zeros(0, 6)}
        params |= {"T": 1, "q": 0.9, "second_per_grid": seconds}
        golden_evs.check(Made(params, one))


def test_flashvid_leaves_only_the_order_of_equal_indices_free() -> None:
    index, tokens = torch.tensor([0, 3, 3, 5]), draw(0, 4, 6)
    expected = golden_flashvid._in_order(index, tokens)
    assert torch.equal(golden_flashvid._in_order(index, tokens[[0, 2, 1, 3]]), expected)
    assert not torch.equal(golden_flashvid._in_order(index, tokens[[1, 0, 2, 3]]), expected)


def test_holitom_whose_still_places_leave_less_than_the_budget() -> None:
    frame = draw(0, 20, 8)
    tensors = {
        "features": frame.repeat(2, 1, 1),
        "attention": draw(1, 2, 20).softmax(-1),
        "newline": draw(2, 8),
        "similarity": torch.ones(1, 20),
        "windows": torch.tensor([[0, 1]]),
        "static_counts": torch.tensor([20]),
        "reduced": torch.tensor(20.0),
        "retain_ratio_after": torch.tensor(1.0, dtype=torch.float64),
        "tokens": frame,
    }
    params = dict.fromkeys(golden_holitom._PARAMS) | {
        "T": 2, "grid_w": 5, "retain_ratio": 0.6, "tau": 0.8, "Beta": 0.6, "D": 0.0, "K": 7,
        "max_window_size": 1024, "no_beta": False, "newline_position": "one_token",
    }  # fmt: skip
    golden_holitom.check(Made(params, tensors))


@pytest.mark.parametrize("layers", [28, 32])
def test_framefusion_whose_first_call_merges_nothing(layers: int) -> None:
    hidden, attention = draw(0, 1, 2 + 12 + 1, 16), draw(1, 1, 2, 15).softmax(-1)
    place = torch.arange(6).repeat(2)
    share = (layers * 0.5 - 1) / (layers - 1)  # one layer has seen all
    best = attention.mean(1)[0, 2:14].topk(round(12 * share)).indices.sort().values
    kept = torch.cat([torch.tensor([0, 1]), best + 2, torch.tensor([14])])
    tensors = {
        "patch_type": torch.cat([torch.tensor([-1, -1]), place, torch.tensor([-1])])[None],
        "sparsity_list": torch.tensor([0.0]),
        "hidden_in_0": hidden,
        "hidden_out_0": hidden,
        "kept_original_0": torch.arange(15),
        "hidden_in_1": hidden,
        "hidden_out_1": hidden[:, kept],
        "kept_original_1": kept,
        "attention_1": attention,
    }
    params = {
        "T": 2, "patches_per_frame": 6, "cost": 0.5, "similarity_lower_bound": 0.999,
        "ratio_lower_bound": 0.1, "num_layers": layers, "stages": ["merge_last", "prune"],
    }  # fmt: skip
    golden_framefusion.check(Made(params, tensors))


def test_settings_and_results_that_files_hold_are_read() -> None:
    """A file that says otherwise is refused."""
    pact = from_file("pact/sel_n60_m40")
    with pytest.raises(AssertionError):
        golden_pact.check(Made(pact.params | {"dc": 0.05}, pact.tensors))
    for name, tensor in (
        ("sel_t6_4x5_b25", "scales"),
        ("vllm_t6_4x4_q70", "scales"),
        ("llavavideo_t3_13x13_b15", "scales"),
        ("llavavideo_t3_13x13_b15", "tokens"),
    ):
        file = from_file(f"vidcom2/{name}")
        golden_vidcom2.check(file)
        with pytest.raises(AssertionError):
            golden_vidcom2.check(changed_in(file, **{tensor: file.tensors[tensor] + 0.01}))


def test_more_tokens_than_there_are_is_what_pore_refuses() -> None:
    tensors = dict.fromkeys(golden_holov._SELECTION, torch.zeros(1))
    tensors |= {"features": draw(0, 1, 6, 4), "attention": draw(1, 1, 6).softmax(-1)}
    golden_holov.check(Made({"variant": "llava", "keep": 7, "crops": 2, "alpha": 0.09}, tensors))

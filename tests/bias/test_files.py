"""Files of position biases, here and on the hub."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from helpers.biases import PROVENANCE, fitted_kinds, noisy, quick
from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.errors import ProfileError


class TestFiles:
    @quick
    @given(
        st.lists(st.floats(1e-7, 1.0), min_size=5, max_size=60),
        fitted_kinds,
        st.text(max_size=20),
        st.one_of(st.none(), st.integers(0, 100)),
    )
    def test_round_trip(
        self, attention: list[float], kind: Any, template: str, layer: int | None
    ) -> None:
        provenance = Provenance(template=template, layer=layer, processor={"size": (1, 2.5)})
        try:
            bias = PositionBias.fit(attention, kind, provenance=provenance)
        except ProfileError:
            return
        assert PositionBias.from_json(bias.to_json()) == bias

    def test_save_and_load(self, tmp_path: Path) -> None:
        bias = PositionBias.fit(noisy(0.01, 36, 0.1), grid=(6, 6), provenance=PROVENANCE)
        path = bias.save(tmp_path / "new" / "bias.json")
        assert PositionBias.load(path) == bias
        assert hash(PositionBias.load(path)) == hash(bias)
        assert PositionBias.from_pretrained(path) == bias
        assert PositionBias.from_pretrained(path.parent, filename="bias.json") == bias
        assert PositionBias.load(bias.allowing("layer").save(path)) == bias

    def test_copies_are_equal(self) -> None:
        bias = PositionBias.fit(noisy(0.01, 36, 0.1), provenance=PROVENANCE)
        assert copy.deepcopy(bias) == bias
        assert pickle.loads(pickle.dumps(bias)) == bias
        assert bias != PositionBias(bias.values, "exponential")
        assert bias != PositionBias.fit(noisy(0.01, 36, 0.1))
        assert bias != "a bias"

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match="Cannot read"):
            PositionBias.load(tmp_path / "none.json")

    def test_every_truncation_is_refused(self, tmp_path: Path) -> None:
        text = PositionBias.exponential(0.1, 3, provenance=PROVENANCE).to_json().rstrip()
        for length in range(len(text)):
            path = tmp_path / "bias.json"
            path.write_text(text[:length])
            with pytest.raises(ProfileError, match=r"bias\.json"):
                PositionBias.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"schema": "other"},
            {"version": 2},
            {"version": "1"},
            {"version": True},
            {"kind": "quadratic"},
            {"kind": ["exponential"]},
            {"n": 4},
            {"n": -1},
            {"n": True},
            {"n": 10**12},
            {"grid": [1]},
            {"grid": [2, 2]},
            {"grid": [1.0, 3.0]},
            {"grid": [-1, -3]},
            {"values": [1.0, 1.0]},
            {"values": [1.0, 1.0, 0.0]},
            {"values": [1.0, 1.0, -1.0]},
            {"values": [1.0, 1.0, "1"]},
            {"values": [1.0, 1.0, None]},
            {"values": [1.0, 1.0, True]},
            {"values": [1.0, 1.0, [1.0]]},
            {"values": [1.0, 1.0, float("nan")]},
            {"values": [1.0, 1.0, float("inf")]},
            {"values": [1.0, 1.0, 10**400]},
            {"values": [1.0, 1e-308, 1e308]},
            {"values": "1, 1, 1"},
            {"values": None},
            {"residuals": [0.0]},
            {"residuals": {"0": 1}},
            {"r2": "high"},
            {"r2": True},
            {"parameters": {"rate": "high"}},
            {"parameters": {"rate": [1]}},
            {"parameters": []},
            {"provenance": {"layer": "two"}},
            {"provenance": {"layer": 2.0}},
            {"provenance": {"layer": -1}},
            {"provenance": {"model": 7}},
            {"provenance": {"normalize": ["prompt"]}},
            {"provenance": {"processor": [1]}},
            {"provenance": {"processor": "x"}},
            {"provenance": {"unheard": "of"}},
            {"provenance": []},
            {"surplus": 1},
        ],
        ids=str,
    )
    def test_what_is_wrong_inside_is_refused(self, change: dict[str, Any]) -> None:
        document = json.loads(PositionBias.exponential(0.1, 3).to_json())
        with pytest.raises(ProfileError):
            PositionBias.from_json(json.dumps({**document, **change}))

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x80\x04\x95",
            b"\xff\xfe{}",
            b"null",
            b"[]",
            b"3",
            b"{}",
            b"[" * 200_000,
            b'{"schema": ' + b"1" * 10_000 + b"}",
            b'{"schema": "pore.position_bias", "version": 1}',
        ],
        ids=lambda data: str(data[:12]),
    )
    def test_what_is_no_profile_is_refused(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "bias.json"
        path.write_bytes(data)
        with pytest.raises(ProfileError, match=r"bias\.json"):
            PositionBias.load(path)

    def test_a_huge_file_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "huge.json"
        with open(path, "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ProfileError, match="larger than any"):
            PositionBias.load(path)


class TestHub:
    bias = PositionBias.exponential(0.003, 36, provenance=PROVENANCE)

    def test_push(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, dict[str, Any]]] = []

        class Api:
            def __init__(self, token: str | None) -> None:
                calls.append(("token", {"token": token}))

            def create_repo(self, repo_id: str, **kwargs: Any) -> None:
                calls.append((repo_id, kwargs))

            def upload_file(self, **kwargs: Any) -> SimpleNamespace:
                calls.append(("upload", kwargs))
                return SimpleNamespace(commit_url="https://hub/commit")

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        assert self.bias.push_to_hub("me/bias", private=True, token="t") == "https://hub/commit"
        token, create, upload = calls
        assert token[1] == {"token": "t"}
        assert create == ("me/bias", {"private": True, "exist_ok": True})
        assert upload[1]["repo_id"] == "me/bias"
        assert upload[1]["path_in_repo"] == "position_bias.json"
        assert PositionBias.from_json(upload[1]["path_or_fileobj"].decode()) == self.bias

    def test_pull(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def download(repo_id: str, filename: str, **kwargs: Any) -> str:
            assert (repo_id, filename) == ("me/bias", "position_bias.json")
            assert kwargs == {"revision": "v1", "token": None}
            return str(self.bias.save(tmp_path / "cached.json"))

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        assert PositionBias.from_pretrained("me/bias", revision="v1") == self.bias

    def test_what_the_hub_has_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(*_: Any, **__: Any) -> str:
            raise LocalEntryNotFoundError("no network")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(ProfileError, match="not a local path, and the hub answers: no network"):
            PositionBias.from_pretrained("me/bias")

    def test_a_name_that_no_repository_can_have(self) -> None:
        with pytest.raises(ProfileError, match="not a local path"):
            PositionBias.from_pretrained("no/such/path/at/all")

"""The position bias P of text-visual attention: fitted, applied, checked, saved and loaded.

PoRe models the attention A_i that the last text token pays to visual token i as P_i · Â_i: a
bias that depends on the position alone, times what the token is worth (arXiv 2508.17807, Eq. 2).
P is fitted to Ā, the mean of A over a data set (Eq. 3), and divided out before the host method
ranks the tokens (Eq. 4). Only the shape of P matters to a ranking, so it is kept at mean 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from pore._files import read_regular, shown, write_atomic
from pore._saved.parsing import parse_json
from pore._saved.seals import check, content, sealed_text
from pore.bias.curves import ROPE_FLOOR, rope_prior
from pore.bias.provenance import _CHECKED, _CONTENT, _NAMES, Provenance, _brief, _difference, _plain
from pore.errors import ProfileError, ProfileMismatchError, ScoreError

if TYPE_CHECKING:
    import numpy.typing as npt


Kind = Literal["exponential", "exponential+offset", "spline", "empirical", "rope"]


FILENAME = "position_bias.json"


_SCHEMA = "pore.position_bias"


_HOST_SCHEMA = "pore.position_biases"


_VERSION = 1


_MAX_POSITIONS = 1 << 20


_MAX_BYTES = 64 << 20


_MAX_STAGES = 1 << 10


_Decoded = TypeVar("_Decoded")


@dataclass(frozen=True, eq=False)
class PositionBias:
    """How much attention a visual token gets for its position alone.

    Two are equal when everything they hold is equal.

    Attributes:
        values: P, of shape (N,), float64 on the CPU, positive, of mean 1; indexed by the raster
            position of a visual token in its image.
        kind: The form of the curve.
        grid: Rows and columns of the N positions, where known.
        parameters: What the curve was made from. For the exponentials, `amplitude` and `offset`
            in units of the attention and `rate` per token: amplitude · exp(rate · i) + offset.
        r2: Share of the variance of the mean attention Ā that the fit explains; None when
            nothing was fitted.
        residuals: Ā minus the fitted curve, of shape (N,), float64, in units of the attention;
            None when nothing was fitted.
        provenance: Where it comes from.
        allowed: Fields of the provenance that `check` passes over; see `allowing`. Not saved.

    Raises:
        ProfileError: `values` is not a finite, positive vector, or another field does not fit it.
    """

    values: Tensor
    kind: Kind
    grid: tuple[int, int] | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    r2: float | None = None
    residuals: Tensor | None = None
    provenance: Provenance = field(default_factory=Provenance)
    allowed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ProfileError(
                f"{_brief(self.kind)} is no kind of position bias; "
                f"there are {', '.join(get_args(Kind))}."
            )
        values = _own(self.values)
        if values.ndim != 1 or not 1 <= len(values) <= _MAX_POSITIONS:
            raise ProfileError(
                f"A position bias is a vector of 1 to {_MAX_POSITIONS} values, "
                f"not of shape {tuple(values.shape)}."
            )
        if not (torch.isfinite(values) & (values > 0)).all():
            raise ProfileError(
                "A position bias must be finite and positive everywhere, for attention is "
                f"divided by it; the least value here is {values.min().item():g}."
            )
        # Saved values have mean 1 but for rounding, and come back to the last bit.
        mean = values.mean()
        if abs(mean.item() - 1) > 1e-9:
            values = (values / values.max()) / (values / values.max()).mean()
            if not (torch.isfinite(values) & (values > 0)).all():
                raise ProfileError(
                    "The position bias spans more than a float64 holds; its smallest values "
                    "vanish beside the largest. Calibrate again."
                )
        object.__setattr__(self, "values", values)
        if self.grid is not None:
            object.__setattr__(self, "grid", _grid(self.grid, len(values)))
        object.__setattr__(self, "parameters", dict(self.parameters))
        for name, number in {**self.parameters, "r2": self.r2 or 0.0}.items():
            if not math.isfinite(number):
                raise ProfileError(f"{name} of a position bias must be finite, not {number}.")
        if self.r2 is not None and not -1 <= self.r2 <= 1:
            raise ProfileError(
                "r2 is the share of the variance that the fit explains, at most 1 and not far "
                f"below 0, but here it is {self.r2}."
            )
        if self.residuals is not None:
            residuals = _own(self.residuals)
            if residuals.shape != values.shape or not torch.isfinite(residuals).all():
                raise ProfileError(
                    f"The residuals of a position bias must be {len(values)} finite numbers."
                )
            object.__setattr__(self, "residuals", residuals)

    @classmethod
    def fit(
        cls,
        mean_attention: Tensor | npt.ArrayLike,
        kind: Kind = "exponential",
        *,
        grid: tuple[int, int] | None = None,
        provenance: Provenance | None = None,
    ) -> PositionBias:
        """Fit a bias to the mean attention of a data set (arXiv 2508.17807, Eq. 3).

        Least squares on the attention itself, as in the paper, not on its logarithm. The kinds:

        - "exponential": a·exp(b·i), the paper's. b > 0 favours the last tokens; b < 0, a bias
          towards the first, is fitted and reported just so.
        - "exponential+offset": a·exp(b·i) + c, held above half the least attention seen, so that
          it cannot cross zero.
        - "spline": a cubic spline of 0, 1, 3 or 7 interior knots, as many as the Bayesian
          information criterion asks for. With none it is one cubic, the form of the weight that
          version 2 of the paper released for FastV.
        - "empirical": the mean attention itself, noise and all.

        Args:
            mean_attention: Ā, of shape (N,): the mean over samples of the attention on each
                visual token. Its scale does not matter to the bias.
            kind: Form of the curve.
            grid: Rows and columns of the visual tokens.
            provenance: Where the attention comes from.

        Returns:
            The bias, with its goodness of fit.

        Raises:
            ScoreError: The attention is no vector of enough finite, non-negative numbers that
                are not all zero.
            ProfileError: No such kind, the grid does not fit, or the curve that fits best is
                not a positive, finite one.
        """
        from pore.bias import curves as _fit

        observed = _fit.mean_attention(mean_attention)
        scale = float(observed.mean())
        scaled = observed / scale
        parameters: dict[str, float]
        if kind == "exponential":
            _fit.need_points(observed, 3, kind)
            curve, parameters = _fit.exponential(scaled)
        elif kind == "exponential+offset":
            _fit.need_points(observed, 4, kind)
            curve, parameters = _fit.exponential_offset(scaled)
        elif kind == "spline":
            _fit.need_points(observed, 5, kind)
            curve, parameters = _fit.spline(scaled)
        elif kind == "empirical":
            curve, parameters = scaled, {}
        else:
            raise ProfileError(
                f"Cannot fit a position bias of kind {_brief(kind)}; choose exponential, "
                "exponential+offset, spline or empirical."
            )
        for name in ("amplitude", "offset"):
            if name in parameters:
                parameters[name] *= scale
        least = curve.min()
        if not least > 0:
            raise ProfileError(
                f"The {kind} fit is not positive everywhere (its least value is "
                f"{least * scale:g}), so attention cannot be divided by it. "
                + (
                    "Average over more samples, or fit another kind."
                    if kind == "empirical"
                    else 'Fit kind="exponential", which is positive by form.'
                )
            )
        residuals = scaled - curve
        spread = float(((scaled - scaled.mean()) ** 2).sum())
        unexplained = float((residuals**2).sum())
        flat = spread <= len(scaled) * 1e-24
        return cls(
            torch.from_numpy(curve),
            kind,
            grid=grid,
            parameters=parameters,
            r2=1.0 if flat else 1.0 - unexplained / spread,
            residuals=torch.from_numpy(residuals * scale),
            provenance=provenance or Provenance(),
        )

    @classmethod
    def exponential(
        cls,
        rate: float,
        n: int,
        *,
        grid: tuple[int, int] | None = None,
        provenance: Provenance | None = None,
    ) -> PositionBias:
        """The bias exp(rate · i) over `n` positions.

        Args:
            rate: b, per token; positive where the last tokens are favoured. Rates published for
                LLaVA-1.5-7B run from 0.0011 to 0.0046 (`pore.profiles`).
            n: Number of positions.
            grid: Rows and columns of the positions.
            provenance: Where the rate comes from.

        Returns:
            The bias.

        Raises:
            ProfileError: `rate` is not finite or spans more than float64 can, or `n` is no
                number of positions.
        """
        _need_count(n)
        if not math.isfinite(rate):
            raise ProfileError(f"The rate of a position bias must be finite, not {rate}.")
        positions = torch.arange(n, dtype=torch.float64)
        # Of the largest value 1, so that no rate overflows.
        values = torch.exp(rate * positions - max(rate * (n - 1), 0.0))
        return cls(
            values,
            "exponential",
            grid=grid,
            parameters={"rate": float(rate)},
            provenance=provenance or Provenance(),
        )

    @classmethod
    def rope(
        cls,
        n: int,
        *,
        head_dim: int,
        text_tokens: int,
        theta: float = 1e4,
        grid: tuple[int, int] | None = None,
    ) -> PositionBias:
        """The data-free prior of SparseVLM+: what RoPE alone makes of equal queries and keys.

        Seen from the last text token, visual token i is n − 1 − i + `text_tokens` positions
        away. The prior oscillates and turns negative at long distances (for a head of 128 and
        theta 1e4, from 1707 on), where it would turn the ranking round. Values below
        `ROPE_FLOOR` times the value at distance 0 are therefore raised to it;
        `parameters["raised"]` counts them.

        Args:
            n: Number of visual tokens, one after another.
            head_dim: Size of a rotated attention head.
            text_tokens: Tokens after the last visual token, the querying one included.
            theta: Base of the rotary embedding, unscaled.
            grid: Rows and columns of the visual tokens.

        Returns:
            The bias.

        Raises:
            ProfileError: A number is out of range.
        """
        _need_count(n)
        if text_tokens < 1:
            raise ProfileError(
                f"The RoPE prior needs text_tokens of at least 1, the querying token itself, "
                f"not {text_tokens}."
            )
        distance = torch.arange(n - 1 + text_tokens, text_tokens - 1, -1, dtype=torch.float64)
        prior = rope_prior(distance, head_dim=head_dim, theta=theta)
        floor = ROPE_FLOOR * math.sqrt(head_dim)
        return cls(
            prior.clamp(min=floor),
            "rope",
            grid=grid,
            parameters={
                "head_dim": head_dim,
                "theta": theta,
                "text_tokens": text_tokens,
                "raised": int((prior < floor).sum()),
            },
        )

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PositionBias):
            return NotImplemented
        if (self.residuals is None) != (other.residuals is None):
            return False
        return (
            torch.equal(self.values, other.values)
            and (
                self.residuals is None or torch.equal(self.residuals, cast(Tensor, other.residuals))
            )
            and all(
                getattr(self, f.name) == getattr(other, f.name)
                for f in fields(self)
                if f.name not in ("values", "residuals")
            )
        )

    def __hash__(self) -> int:
        return hash((self.kind, len(self), self.growth, self.grid, self.provenance, self.allowed))

    def __repr__(self) -> str:
        size = f"{len(self)} positions"
        if self.grid is not None:
            size += f" ({self.grid[0]}×{self.grid[1]})"
        parts = [self.kind, size, f"last/first = {self.growth:.3g}"]
        if self.r2 is not None and self.kind != "empirical":
            parts.append(f"R² = {self.r2:.3f}")
        if raised := self.parameters.get("raised"):
            parts.append(f"{raised:.0f} raised to the floor")
        for f in fields(Provenance):
            value = getattr(self.provenance, f.name)
            if value is not None and f.name not in ("processor", "template", *_CONTENT):
                parts.append(f"{f.name} {value}")
        if self.allowed:
            parts.append(f"not checked: {', '.join(sorted(self.allowed))}")
        return f"PositionBias({', '.join(parts)})"

    @property
    def growth(self) -> float:
        """P of the last position over P of the first: how much the end is favoured."""
        return float(self.values[-1] / self.values[0])

    @property
    def rate(self) -> float:
        """Mean growth of log P per token; b of an exponential; 0 for a single position."""
        return math.log(self.growth) / max(len(self) - 1, 1)

    @property
    def from_first(self) -> Tensor:
        """P in the form P_0 = 1, of shape (N,), float64; its inverse is version 2's weight."""
        return self.values / self.values[0]

    def divide(self, attention: Tensor, index: Tensor | None = None) -> Tensor:
        """Divide attention by the bias: Â = A / P (arXiv 2508.17807, Eq. 4).

        Args:
            attention: A, of shape (..., n), floating, on any device.
            index: Raster position of every column, integer, broadcastable to (..., n), each from
                0 to N − 1; columns that stand for nothing may name any of them. None when the
                columns are the N positions in order.

        Returns:
            Â, of shape (..., n), on the device of `attention`, in its precision but at least
            float32. Its unit is that of `attention`, P being of mean 1.

        Raises:
            ScoreError: `attention` is not floating, or `index` holds no integers or no such
                shape or (seen on the CPU only, elsewhere it costs a synchronisation) no
                positions of this bias.
            ProfileMismatchError: There are not N columns and no `index`.
        """
        if not attention.is_floating_point():
            raise ScoreError(f"Attention must be floating point, not {attention.dtype}.")
        if index is None:
            self.check(n=attention.shape[-1])
        dtype = torch.promote_types(attention.dtype, torch.float32)
        # Converted on the CPU: not every device has float64.
        bias = self.values.to(dtype).to(attention.device)
        if index is not None:
            if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
                raise ScoreError(f"Positions must be integers, not {index.dtype}.")
            if index.device.type == "cpu" and index.numel():
                low, high = index.aminmax()
                if low < 0 or high >= len(self):
                    raise ScoreError(
                        f"Positions run from {int(low)} to {int(high)}, but this bias has "
                        f"positions 0 to {len(self) - 1}. {_OTHER_LENGTH}"
                    )
            try:
                index = index.to(attention.device).expand(attention.shape)
            except RuntimeError as error:
                raise ScoreError(
                    f"Positions of shape {tuple(index.shape)} do not fit attention of shape "
                    f"{tuple(attention.shape)}."
                ) from error
            bias = bias[index]
        return attention.to(dtype) / bias

    def check(
        self,
        *,
        n: int | None = None,
        model: str | None = None,
        revision: str | None = None,
        layer: int | None = None,
        normalize: str | None = None,
        processor: Mapping[str, Any] | None = None,
        template: str | None = None,
        weights: str | Callable[[], str | None] | None = None,
        config: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Refuse to be used under other conditions than those it was measured under.

        What is unknown (None) on either side is not compared; of `processor` and `config`, the
        settings that both sides name are. Of `model`, a local path is compared by its last part,
        and the authors' checkpoints and their conversions by llava-hf count as the same model.

        `weights` and `config` are of a model by its name, so they are compared where that is the
        same: a model or a revision that is another, or was allowed, has others. Weights in another
        number format cannot be compared, and pass.

        Args:
            n: Number of visual positions at hand.
            model: Name or path of the model at hand.
            revision: Its revision.
            layer: The layer to be pruned.
            normalize: The word for what the host reads.
            processor: Settings of the image processor.
            template: The prompt template.
            weights: The fingerprint of the model's weights, or what gives it where it is needed.
            config: The settings of the model's config, or what gives them.

        Raises:
            ProfileMismatchError: Something differs; the message names all of it, and the way
                round it.
        """
        here = {
            "model": model,
            "revision": revision,
            "weights": weights,
            "config": config,
            "layer": layer,
            "normalize": normalize,
            "processor": None if processor is None else _plain(processor),
            "template": template,
        }
        differences = []
        ways = []
        if n is not None and n != len(self):
            differences.append(f"positions: the profile has {len(self)}, here are {n}")
            ways.append(_OTHER_LENGTH)
        names: list[str] = []
        for name in _CHECKED:
            if name in self.allowed:
                continue
            if name in _CONTENT and not self.allowed.union(names).isdisjoint(_NAMES):
                continue
            found = _difference(name, getattr(self.provenance, name), here[name])
            differences += found
            if found:
                names.append(name)
        if names:
            ways.append(
                "If you know that it holds here all the same, say so with bias.allowing("
                + ", ".join(repr(name) for name in names)
                + ")."
            )
        if differences:
            raise ProfileMismatchError(
                "The position bias was measured under other conditions: "
                + "; ".join(differences)
                + ". Calibrate under the conditions at hand (pore calibrate). "
                + " ".join(ways)
            )

    def allowing(self, *names: str) -> PositionBias:
        """The same bias, for use where the named fields differ. The override is not saved.

        Args:
            names: Of "model", "revision", "weights", "config", "layer", "normalize", "processor",
                "template". Another model or revision has other weights and another config, which
                are then not compared either.

        Returns:
            A copy whose `check` passes over these fields.

        Raises:
            ProfileError: There is no such field, or it cannot be passed over, as the number of
                positions.
        """
        for name in names:
            if name == "n":
                raise ProfileError(f"The number of positions cannot be allowed. {_OTHER_LENGTH}")
            if name not in _CHECKED:
                raise ProfileError(
                    f"{_brief(name)} is nothing that is checked; choose from {', '.join(_CHECKED)}."
                )
        return replace(self, allowed=self.allowed | set(names))

    def resample(
        self, n: int | None = None, *, grid: tuple[int, int] | None = None
    ) -> PositionBias:
        """The bias stretched to another number of positions, by relative raster position.

        Position i of n sits at (i + ½) / n of the whole. Between positions log P is read on
        straight lines, which keeps an exponential one. That a bias measured on one grid holds on
        another is an assumption; nothing in pore makes it unasked, and `provenance.source` of
        the result names it. The quality of the fit is not carried over.

        Args:
            n: Number of positions wanted; given by `grid` if left out.
            grid: Rows and columns wanted.

        Returns:
            The resampled bias.

        Raises:
            ProfileError: Neither is given, or they contradict each other.
        """
        import numpy as np

        if n is None:
            if grid is None:
                raise ProfileError("Resampling needs the number of positions wanted, or the grid.")
            n = math.prod(grid)
        _need_count(n)
        old = len(self)
        note = f"resampled from {old} to {n} positions"
        source = self.provenance.source
        provenance = replace(
            self.provenance, source=note if source is None else f"{source}; {note}"
        )
        if self.kind == "exponential":
            return PositionBias.exponential(
                self.rate * old / n, n, grid=grid, provenance=provenance
            )
        places = (np.arange(n) + 0.5) * old / n - 0.5
        logs = self.values.log().numpy()
        if old > 1:
            left = np.clip(np.floor(places).astype(int), 0, old - 2)
            logs = logs[left] + (places - left) * (logs[left + 1] - logs[left])
        else:
            logs = np.full(n, logs[0])
        return PositionBias(
            torch.from_numpy(np.exp(logs - logs.max())),
            self.kind,
            grid=grid,
            provenance=provenance,
        )

    def to_json(self) -> str:
        """The bias as JSON text: schema, version, every field but `allowed`, and a checksum."""
        return sealed_text(self._document())

    def _document(self) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "version": _VERSION,
            "kind": self.kind,
            "n": len(self),
            "grid": self.grid,
            "parameters": self.parameters,
            "r2": self.r2,
            "provenance": asdict(self.provenance),
            "values": self.values.tolist(),
            "residuals": None if self.residuals is None else self.residuals.tolist(),
        }

    @classmethod
    def from_json(cls, text: str | bytes) -> PositionBias:
        """Read what `to_json` wrote.

        Args:
            text: The JSON text, or its bytes in UTF-8; trusted in nothing.

        Returns:
            The bias.

        Raises:
            ProfileError: The text is no position bias that this version can read.
        """
        return _decode(_document(text))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the bias to a JSON file, whole or not at all.

        Args:
            path: The file; missing folders are made.

        Returns:
            The path written.

        Raises:
            OSError: It cannot be written.
        """
        return write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PositionBias:
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Returns:
            The bias.

        Raises:
            ProfileError: There is no such file, or it is damaged, too large, of another version
                or something else altogether.
        """
        return _read(path, cls.from_json)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = FILENAME,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Add a position bias for PoRe",
        token: str | None = None,
    ) -> str:
        """Upload the bias to a model repository of the Hugging Face hub, made if missing.

        Args:
            repo_id: "owner/name".
            filename: Path of the file in the repository.
            private: Whether a repository made here is private; None for the owner's default.
            revision: The branch to commit to.
            commit_message: The commit's message.
            token: Access token; None for the one logged in with.

        Returns:
            The address of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: The hub refused.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=self.to_json().encode(),
            path_in_repo=filename,
            repo_id=repo_id,
            revision=revision,
            commit_message=commit_message,
        )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        repo_id_or_path: str | os.PathLike[str],
        *,
        filename: str = FILENAME,
        revision: str | None = None,
        token: str | None = None,
    ) -> PositionBias:
        """Read a bias from the Hugging Face hub, a folder or a file.

        Args:
            repo_id_or_path: "owner/name" of a model repository, or a local folder or file.
            filename: Path of the file in the repository or folder.
            revision: Branch, tag or commit of the repository.
            token: Access token; None for the one logged in with.

        Returns:
            The bias.

        Raises:
            ProfileError: It cannot be found or read.
        """
        return cls.load(_find(repo_id_or_path, filename, revision, token))


def _find(
    repo_id_or_path: str | os.PathLike[str],
    filename: str,
    revision: str | None,
    token: str | None,
) -> str | os.PathLike[str]:
    """A local path, or where the hub's file has been downloaded to."""
    local = Path(repo_id_or_path)
    # Not pathlib's, which raise errors for names that no file can have.
    if os.path.isdir(local):
        return local / filename
    if os.path.exists(local) or local.suffix == ".json":
        return local

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    repo_id = os.fspath(repo_id_or_path)
    try:
        return hf_hub_download(repo_id, filename, revision=revision, token=token)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ProfileError(
            f"No position bias {filename} of {repo_id!r}: it is no local path, and the hub "
            f"answers: {error}"
        ) from error


def _read(path: str | os.PathLike[str], decode: Callable[[bytes], _Decoded]) -> _Decoded:
    """A file's content, or ProfileError."""
    name = shown(path)
    try:
        return decode(read_regular(path, _MAX_BYTES))
    except OSError as error:
        raise ProfileError(
            f"Cannot read the position bias {name}: {error.strerror or error}."
        ) from error
    except ProfileError as error:
        raise ProfileError(f"{name}: {error}") from error


_OTHER_LENGTH = "For another number of positions, ask for bias.resample(n)."


def _need_count(n: int) -> None:
    if not 1 <= n <= _MAX_POSITIONS:
        raise ProfileError(f"A position bias has 1 to {_MAX_POSITIONS} positions, not {n}.")


def _own(values: Tensor) -> Tensor:
    """A copy for ourselves: float64, on the CPU, outside autograd and inference mode."""
    with torch.inference_mode(False):
        return values.detach().to("cpu", torch.float64).clone()


def _grid(grid: Sequence[int], n: int) -> tuple[int, int]:
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != n:
        raise ProfileError(
            f"A grid of {rows} rows and {columns} columns does not have {n} positions."
        )
    return int(rows), int(columns)


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": str,
    "version": int,
    "kind": str,
    "n": int,
    "grid": (list, type(None)),
    "parameters": dict,
    "r2": (int, float, type(None)),
    "provenance": dict,
    "values": list,
    "residuals": (list, type(None)),
}


def _document(text: str | bytes) -> Any:
    """JSON text of any origin, or ProfileError."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise ProfileError(f"not a position bias, or cut off: {error}") from error


def _check_sum(document: Mapping[str, Any]) -> None:
    """Refuse a document that is not as it was saved."""
    try:
        check(document)
    except ValueError as error:
        raise ProfileError(str(error)) from error


def _decode(document: Any) -> PositionBias:
    """A position bias from JSON of any origin, or ProfileError."""
    if isinstance(document, dict) and document.get("schema") == _HOST_SCHEMA:
        raise ProfileError("the biases of several stages: read them with pore.bias.load_biases.")
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
        raise ProfileError(f'not a position bias: there is no "schema": "{_SCHEMA}".')
    if document.get("version") != _VERSION:
        raise ProfileError(
            f"a position bias of version {_brief(document.get('version'))}, but this pore reads "
            f"version {_VERSION}. Update pore, or calibrate again."
        )
    sealed, document = document, content(document)
    if document.keys() != _FIELDS.keys():
        wrong = sorted(document.keys() ^ _FIELDS.keys())
        raise ProfileError(f"missing or unknown fields: {_brief(wrong)}.")
    for name, types in _FIELDS.items():
        if not isinstance(document[name], types) or isinstance(document[name], bool):
            raise ProfileError(f"the field {name} is {_brief(document[name])}, of a wrong type.")
    n = document["n"]
    if not 1 <= n <= _MAX_POSITIONS:
        raise ProfileError(f"n must be from 1 to {_MAX_POSITIONS}, not {_brief(n)}.")
    grid = document["grid"]
    if grid is not None and not (len(grid) == 2 and all(type(x) is int for x in grid)):
        raise ProfileError(f"grid must be two whole numbers, not {_brief(grid)}.")
    known = {f.name for f in fields(Provenance)}
    if not document["provenance"].keys() <= known:
        wrong = sorted(document["provenance"].keys() - known)
        raise ProfileError(f"unknown fields of the provenance: {_brief(wrong)}.")
    residuals = document["residuals"]
    r2 = document["r2"]
    bias = PositionBias(
        _vector(document["values"], n, "values"),
        cast(Kind, document["kind"]),
        grid=None if grid is None else (grid[0], grid[1]),
        parameters=dict(
            zip(
                document["parameters"],
                _vector(list(document["parameters"].values()), None, "parameters").tolist(),
                strict=True,
            )
        ),
        r2=None if r2 is None else _vector([r2], 1, "r2").item(),
        residuals=None if residuals is None else _vector(residuals, n, "residuals"),
        provenance=Provenance(**document["provenance"]),
    )
    _check_sum(sealed)
    return bias


def _vector(numbers: list[Any], n: int | None, name: str) -> Tensor:
    """Numbers of a JSON list as a float64 vector, or ProfileError."""
    if n is not None and len(numbers) != n:
        raise ProfileError(f"{name} has {len(numbers)} entries where there should be {n}.")
    for number in numbers:
        if type(number) not in (int, float):
            raise ProfileError(f"{name} holds {_brief(number)}, which is not a number.")
    try:
        return torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    except OverflowError as error:
        raise ProfileError(f"{name} holds a number that is out of range.") from error

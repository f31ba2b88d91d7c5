"""SparseVLM: clusters of dropped tokens, and what is merged of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers.golden_files import Made, draw
from helpers.sparsevlm import (
    features,
    lengths,
    seeds,
)
from methods import golden_sparsevlm
from pore.methods._sparsevlm import (
    matrix_ranks,
    recycle,
    split,
    strongest_heads,
)
from pore.tensors.clustering import density_peaks
from pore.tensors.merging import group_means
from pore.tensors.selection import top_k


class TestClusters:
    @given(seeds, st.integers(1, 24), st.data())
    def test_every_cluster_has_its_centre(self, seed: int, m: int, data: Any) -> None:
        count = data.draw(st.integers(1, m))
        x, valid = features(seed, 1, m, 3), torch.ones(1, m, dtype=torch.bool)
        cluster, centres = density_peaks(x, [count], valid)
        assert cluster[0, centres[0]].tolist() == list(range(count))
        assert set(cluster[0].tolist()) == set(range(count))
        distance = torch.cdist(x, x)[0][:, centres[0]]
        others = torch.ones(m, dtype=torch.bool)
        others[centres[0]] = False
        assert torch.equal(cluster[0, others], distance[others].argmin(-1))

    @given(seeds, st.integers(3, 16), st.data(), st.randoms(use_true_random=False))
    def test_move_with_the_tokens(self, seed: int, m: int, data: Any, random: Any) -> None:
        count = data.draw(st.integers(1, m).filter(lambda c: c != 2))
        order = list(range(m))
        random.shuffle(order)
        x, valid = features(seed, 1, m, 3), torch.ones(1, m, dtype=torch.bool)
        cluster, _ = density_peaks(x, [count], valid)
        moved, _ = density_peaks(x[:, order], [count], valid)
        # With as many clusters as tokens all densities are of all distances, and can be equal.
        assume(count < m)
        torch.testing.assert_close(
            group_means(x[:, order], moved, valid, count)[0],
            group_means(x, cluster, valid, count)[0],
        )

    def test_noise_is_what_the_authors_add(self) -> None:
        """It decides between two that are each other's nearest; here the first is the centre."""
        x = torch.tensor([[[10.0], [11.0], [0.0], [2.0]]])
        valid = torch.ones(1, 4, dtype=torch.bool)
        first, second = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0, 1.0, 0, 0]])
        plain, centres = density_peaks(x, [2], valid)
        assert plain.tolist() == [[0, 0, 1, 1]]
        assert centres.tolist() == [[0, 2]]
        assert density_peaks(x, [2], valid, first)[1][0, 0] == 0
        assert density_peaks(x, [2], valid, second)[1][0, 0] == 1

    def test_equal_tokens(self) -> None:
        x = torch.ones(1, 12, 5)
        valid = torch.ones(1, 12, dtype=torch.bool)
        cluster, centres = density_peaks(x, [2], valid)
        assert centres.tolist() == [[0, 1]]
        assert cluster[0].tolist() == [0, 1] + [0] * 10
        assert torch.equal(group_means(x, cluster, valid, 2)[0], torch.ones(1, 2, 5))

    def test_far_away_tokens_do_not_underflow(self) -> None:
        """Densities are compared by their logarithms."""
        x = 1e3 * features(0, 1, 20, 8).float()
        valid = torch.ones(1, 20, dtype=torch.bool)
        near, _ = density_peaks(x.double(), [3], valid)
        assert torch.equal(density_peaks(x, [3], valid)[0], near)

    @given(seeds)
    def test_merging_keeps_the_sum(self, seed: int) -> None:
        x, valid = features(seed, 2, 9, 3), torch.arange(9) < torch.tensor([[9], [5]])
        cluster, _ = density_peaks(x, [3, 2], valid)
        means = group_means(x, cluster, valid, 3)[0]
        for i, (count, m) in enumerate([(3, 9), (2, 5)]):
            sizes = torch.bincount(cluster[i, :m], minlength=count).to(x)
            total = (sizes[:, None] * means[i, :count]).sum(0)
            torch.testing.assert_close(total, x[i, :m].sum(0))
        assert not means[1, 2].any()

    @given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
    def test_recycling_a_batch_equals_its_images(
        self, seed: int, sizes: list[int], data: Any
    ) -> None:
        widest = max(sizes)
        x, scores = features(seed, len(sizes), widest, 6), features(seed + 1, len(sizes), widest)
        valid = torch.arange(widest) < torch.tensor(sizes)[:, None]
        shares = [split(data.draw(st.integers(1, size)), size) for size in sizes]
        assume(any(merged for _, merged in shares))
        kept, merged = [s[0] for s in shares], [s[1] for s in shares]
        keep = top_k(scores, kept, valid)
        raster = torch.arange(widest).expand(len(sizes), -1)
        for after in (True, False):
            together = recycle(x, raster, scores, keep, valid, merged, after)
            assert lengths(together.keep) == [sum(share) for share in shares]
            for i, size in enumerate(sizes):
                if not merged[i]:
                    chosen = together.features[i][together.keep[i]]
                    assert torch.equal(chosen, x[i][keep[i]])
                    continue
                one = slice(i, i + 1), slice(0, size)
                alone = recycle(
                    x[one], raster[one], scores[one], keep[one], valid[one], [merged[i]], after
                )
                assert torch.equal(together.keep[one], alone.keep)
                got, expected = together.features[i][together.keep[i]], alone.features[alone.keep]
                torch.testing.assert_close(got, expected)
                if after:
                    assert torch.equal(got[: kept[i]], x[i][keep[i]])
                    rasters = together.raster[i][together.keep[i]].tolist()
                    assert rasters == [*raster[i][keep[i]].tolist(), *[-1] * merged[i]]
                else:
                    assert torch.equal(together.features[i][keep[i]], x[i][keep[i]])


@given(seeds, st.integers(1, 20), st.floats(0.1, 10))
def test_strongest_heads(seed: int, count: int, scale: float) -> None:
    scores = features(seed, 2, 16, 5).abs()
    chosen = strongest_heads(scores, count)
    assert chosen.shape == (2, min(count, 16))
    assert torch.equal(chosen, strongest_heads(scores * scale, count))
    expected = scores.sum(-1).topk(min(count, 16)).indices
    assert torch.equal(chosen, expected)


def test_ranks_of_matrices_of_several_sizes() -> None:
    full, low = features(0, 4, 9), features(1, 4, 2) @ features(2, 2, 6)
    matrix = torch.zeros(2, 5, 9, dtype=torch.float64)
    matrix[0, :4], matrix[1, :4, :6] = full, low
    assert matrix_ranks(matrix, [9, 6]) == [4, 2]


# -- the checker of golden files, on files made here -----------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_clusters_are_decided_by_the_files_noise(number: int) -> None:
    """Of two clusters equal densities leave the choice of centres to the noise."""
    for seed in range(6):
        x, noise = draw(seed, 14, 8), torch.rand(14, generator=torch.Generator().manual_seed(seed))
        distance = torch.cdist(x.double(), x.double()) / 8**0.5
        near = distance.square().sort(-1).values[:, :number].mean(-1)
        density = (-near).exp() + noise.double() * 1e-6
        gaps = []
        for i in range(14):
            denser = [float(distance[i, j]) for j in range(14) if density[j] > density[i]]
            gaps.append(min(denser, default=float(distance.max())))
        peak = torch.tensor(gaps) * density
        centres = sorted(range(14), key=lambda i: -float(peak[i]))[:number]
        group = [int(distance[i, centres].argmin()) for i in range(14)]
        for j, centre in enumerate(centres):
            group[centre] = j
        merged = torch.stack(
            [x[[i for i in range(14) if group[i] == j]].mean(0) for j in range(number)]
        )
        case = {"cluster_num": torch.tensor(number), "density_noise": noise, "x": x}
        tensors = {f"cluster0.{name}": value for name, value in {**case, "merged": merged}.items()}
        golden_sparsevlm.check(Made({}, tensors))

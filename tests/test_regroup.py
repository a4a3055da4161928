"""Regroup: clusters of rows, dense blocks, and layers run block by block."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunus.errors import InvalidValue, MaskMismatch, UnknownName, Unsupported
from prunus.masks import Masks
from prunus.models.create import create
from prunus.parameters import prunable
from prunus.procedures.structure_lth import structure_lth, targets
from prunus.structured.blocks import DenseBlock, block_forward, block_matmul, blocks_of, cover, split_rows
from prunus.structured.partition import (
    check_partition,
    hyperedge_cut,
    hypergraph_clusters,
    jaccard,
    jaccard_clusters,
    partitioner,
)
from prunus.structured.regroup import at_least, column_rule, covering, filling, regroup, regroup_masks
from small_runs import normed_run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PARTITIONS = {"hypergraph": hypergraph_clusters, "jaccard": jaccard_clusters}


def bits(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(sizes: list[int], widths: list[int], seed: int) -> torch.Tensor:
    """Return a block-diagonal mask with shuffled rows and columns, one empty row and one empty column."""
    mask = torch.zeros(sum(sizes) + 1, sum(widths) + 1, dtype=torch.bool)
    row = column = 0
    for height, width in zip(sizes, widths, strict=True):
        mask[row : row + height, column : column + width] = True
        row, column = row + height, column + width
    g = seeded(seed)
    return mask[torch.randperm(len(mask), generator=g)][:, torch.randperm(mask.shape[1], generator=g)]


def pairs(blocks: list[DenseBlock]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(tuple(b.rows.tolist()), tuple(b.columns.tolist())) for b in blocks}


def random_matrix(rows: int, columns: int, density: float, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=seeded(seed)) < density


masks = st.builds(
    random_matrix,
    st.integers(1, 14),
    st.integers(1, 14),
    st.sampled_from([0.0, 0.1, 0.4, 0.8, 1.0]),
    st.integers(0, 10_000),
)


# -- clusters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_hand_case(name):
    # Columns join the rows {1, 2}, {1, 2}, {3, 4}, {3, 4}.
    mask = bits("1100", "1100", "0011", "0011")
    assert hyperedge_cut(mask, [torch.tensor([0, 2]), torch.tensor([1, 3])]) == 4
    found = PARTITIONS[name](mask, 2)
    assert [part.tolist() for part in found] == [[0, 1], [2, 3]]
    assert hyperedge_cut(mask, found) == 0
    crossed = PARTITIONS[name](mask[[0, 2, 1, 3]], 2)
    assert [part.tolist() for part in crossed] == [[0, 2], [1, 3]]


def test_jaccard_by_hand():
    found = jaccard(bits("110", "011", "000", "110"))
    assert found[0].tolist() == [1, pytest.approx(1 / 3), 0, 1]
    assert found[2].tolist() == [0, 0, 1, 0]
    assert torch.equal(found, found.T)


@given(masks, st.integers(1, 14), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from(sorted(PARTITIONS)))
@settings(max_examples=150, deadline=None)
def test_clusters_are_a_balanced_partition(mask, count, imbalance, name):
    rows = len(mask)
    if count > rows:
        with pytest.raises(InvalidValue, match="clusters"):
            PARTITIONS[name](mask, count)
        return
    found = PARTITIONS[name](mask, count, imbalance=imbalance)
    assert sorted(torch.cat(found).tolist()) == list(range(rows))
    assert all(part.numel() and part.tolist() == sorted(part.tolist()) for part in found)
    assert [int(p[0]) for p in found] == sorted(int(p[0]) for p in found)
    assert [p.tolist() for p in found] == [p.tolist() for p in PARTITIONS[name](mask, count, imbalance=imbalance)]
    if name == "hypergraph":
        assert len(found) == count
    if name == "hypergraph" and count == 2:
        assert abs(len(found[0]) - len(found[1])) <= 1 + 2 * int(imbalance * rows)
    if name == "jaccard":
        assert len(found) >= count
        assert max(map(len, found)) <= -(-rows * (1 + imbalance) // count)


@pytest.mark.parametrize("seed", range(12))
def test_bisection_against_all_bisections(seed):
    """On matrices small enough to try everything: never better than the best cut, and mostly equal to it."""
    mask = random_matrix(8, 10, 0.25, seed)
    found = hyperedge_cut(mask, hypergraph_clusters(mask, 2, imbalance=0.0))
    cuts = []
    for sides in product([False, True], repeat=8):
        side = torch.tensor(sides)
        if int(side.sum()) == 4:
            cuts.append(hyperedge_cut(mask, [side.nonzero().flatten(), (~side).nonzero().flatten()]))
    assert min(cuts) <= found <= min(cuts) + 1
    assert found < sum(cuts) / len(cuts)


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 10_000), st.sampled_from(sorted(PARTITIONS)))
@settings(max_examples=80, deadline=None)
def test_planted_blocks_of_equal_height_have_no_cut(count, height, seed, name):
    widths = torch.randint(2, 9, (count,), generator=seeded(seed)).tolist()
    mask = planted([height] * count, widths, seed)
    mask = mask[mask.any(1)]
    found = PARTITIONS[name](mask, count)
    assert len(found) == count
    assert hyperedge_cut(mask, found) == 0


def test_planted_blocks_of_unequal_height_within_the_tolerance():
    for seed in range(40):
        g = seeded(seed)
        count = int(torch.randint(2, 5, (1,), generator=g))
        sizes = torch.randint(8, 12, (count,), generator=g).tolist()
        mask = planted(sizes, torch.randint(2, 20, (count,), generator=g).tolist(), seed)
        mask = mask[mask.any(1)]
        found = hypergraph_clusters(mask, count)
        assert sorted(map(len, found)) == sorted(sizes)
        assert hyperedge_cut(mask, found) == 0


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("count", [2, 4])
def test_noisy_blocks_are_found(name, count):
    """A fifth of every block is missing and noise lies outside, so that most columns are cut by any clusters."""
    for seed in range(3):
        g = seeded(seed)
        kind = torch.arange(16 * count)[torch.randperm(16 * count, generator=g)] % count
        inside = kind[:, None] == torch.arange(30 * count)[None, :] % count
        noise = torch.rand(inside.shape, generator=g)
        mask = torch.where(inside, noise > 0.2, noise < 0.02)
        found = PARTITIONS[name](mask, count)
        assert len(found) == count
        assert {len(set(kind[part].tolist())) for part in found} == {1}


def test_similarity_decides_where_every_column_is_cut():
    """Two dense prototypes with a quarter of their entries flipped: no cut is small."""
    for seed in range(5):
        g = seeded(seed)
        prototypes = torch.rand(2, 300, generator=g) < 0.5
        kind = torch.arange(40)[torch.randperm(40, generator=g)] % 2
        mask = prototypes[kind] ^ (torch.rand(40, 300, generator=g) < 0.25)
        found = jaccard_clusters(mask, 2)
        assert hyperedge_cut(mask, found) > 290
        assert {len(set(kind[part].tolist())) for part in found} == {1}


def test_what_a_partitioner_owes():
    assert partitioner(hypergraph_clusters) is hypergraph_clusters
    with pytest.raises(UnknownName, match="hypergraph"):
        partitioner("hypergraphs")
    with pytest.raises(InvalidValue, match="imbalance"):
        partitioner("jaccard", 2.0)
    assert [
        p.tolist()
        for p in check_partition([torch.tensor([2, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([1])], 3)
    ] == [[0, 2], [1]]
    for bad in ([], [torch.tensor([0, 1])], [torch.tensor([0, 1, 2, 2])], [torch.tensor([0, 1]), torch.tensor([3])]):
        with pytest.raises(InvalidValue, match="exactly once"):
            check_partition(bad, 3)
    with pytest.raises(InvalidValue, match="exactly once"):
        regroup(bits("11", "11"), partition=lambda mask, count: [torch.tensor([0])])


# -- columns ------------------------------------------------------------------------------------------------------


def test_column_rules_by_hand():
    cluster = bits("1101", "1100", "1010")
    assert at_least(cluster, 2).tolist() == [True, True, False, False]
    # Seven non-zeros in three rows: three columns; the third of them is the earlier of two with one non-zero.
    assert filling(cluster).tolist() == [True, True, True, False]
    # i = 1: a row with 2 left needs i > 3; i = 2: 1 left needs i > 1.5.
    assert covering(cluster).tolist() == [True, True, False, False]
    assert covering(cluster, slack=2.0).tolist() == [True, True, True, False]
    assert covering(bits("000", "000")).tolist() == [False] * 3


def test_covering_counts_columns_in_sorted_order_for_all_rows():
    """Against a loop; unsorted or stopped counters give another length on these."""
    for seed in range(30):
        cluster = random_matrix(6, 12, 0.4, seed)
        order = sorted(range(12), key=lambda c: (-int(cluster[:, c].sum()), c))
        left = cluster.sum(1).tolist()
        taken: list[int] = []
        for column in order:
            taken.append(column)
            left = [n - int(cluster[r, column]) for r, n in enumerate(left)]
            if all(len(taken) > 1.5 * n for n in left):
                break
        assert covering(cluster).nonzero().flatten().tolist() == sorted(taken)


def test_column_rule_names():
    assert column_rule("filling") is filling
    assert column_rule(3)(bits("1", "1", "1")).tolist() == [True]
    assert column_rule("4")(bits("1", "1", "1")).tolist() == [False]
    for bad in (0, -1, True, 1.5, "most", None):
        with pytest.raises(InvalidValue, match="min_nonzeros"):
            column_rule(bad)


# -- blocks -------------------------------------------------------------------------------------------------------


@given(
    masks, st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3, "filling", "covering"])
)
@settings(max_examples=150, deadline=None)
def test_blocks_are_rectangles_with_disjoint_rows(mask, clusters, min_rows, min_columns, rule):
    blocks = regroup(mask, clusters=clusters, min_rows=min_rows, min_columns=min_columns, min_nonzeros=rule)
    rows = [row for block in blocks for row in block.rows.tolist()]
    assert len(rows) == len(set(rows))
    for block in blocks:
        assert block.rows.numel() >= min_rows
        assert block.columns.numel() >= min_columns
        inside = mask[block.rows]
        assert bool(inside.any(1).all()), "an empty row belongs to no block"
        counts = inside.sum(0)[block.columns]
        assert bool((counts >= (rule if isinstance(rule, int) else 1)).all())
        if rule == "filling":
            assert 0 <= block.size - int(inside.sum()) < block.rows.numel()
    made = cover(blocks, tuple(mask.shape))
    assert int(made.sum()) == sum(block.size for block in blocks)


@given(
    st.integers(2, 6), st.integers(2, 6), st.integers(0, 10_000), st.sampled_from(["hypergraph", "jaccard"]),
    st.sampled_from([2, "filling", "covering"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_planted_blocks_are_recovered(count, height, seed, partition, rule):
    widths = torch.randint(2, 9, (count,), generator=seeded(seed)).tolist()
    mask = planted([height] * count, widths, seed)
    blocks = regroup(mask, clusters=count, min_nonzeros=rule, partition=partition)
    if rule == "covering":  # stops as soon as rows have little left, so it may leave a last column out
        assert len(blocks) == count
        return
    assert torch.equal(cover(blocks, tuple(mask.shape)), mask)
    assert pairs(blocks) == pairs(blocks_of(mask))
    assert len(blocks) == count


def test_later_passes_take_the_rows_that_are_left():
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[:4, :4] = mask[4:8, 4:8] = True
    mask[8:, 8:] = True
    whole = regroup(mask, clusters=3, min_nonzeros=4)
    assert torch.equal(cover(whole, (12, 12)), mask)
    # Two rows of every four are of no use to a block of at least four non-zeros per column in the first pass.
    uneven = torch.zeros(9, 8, dtype=torch.bool)
    uneven[:6, :4] = True
    uneven[6:, 4:] = True

    def first_six_or_all(part: torch.Tensor, count: int) -> list[torch.Tensor]:
        rows = torch.arange(len(part))
        return [rows[:3], rows[3:]] if len(rows) == 9 else [rows]

    once = regroup(uneven, clusters=2, min_nonzeros=3, min_rows=4, partition=first_six_or_all, passes=1)
    again = regroup(uneven, clusters=2, min_nonzeros=3, min_rows=3, partition=first_six_or_all)
    assert len(once) == 1
    assert sum(b.rows.numel() for b in again) == 9


def test_nothing_dense_enough_gives_no_blocks():
    assert regroup(torch.zeros(4, 4, dtype=torch.bool)) == []
    assert regroup(torch.eye(6, dtype=torch.bool), min_nonzeros=2) == []
    assert regroup(bits("1111"), min_rows=2) == []
    with pytest.raises(InvalidValue, match="bool matrix"):
        regroup(torch.ones(3, 3))
    for bad in ({"clusters": 0}, {"min_rows": 0}, {"min_columns": 1.5}, {"passes": 0}):
        with pytest.raises(InvalidValue, match=next(iter(bad))):
            regroup(bits("11", "11"), **bad)


@given(masks)
@settings(max_examples=100, deadline=None)
def test_every_mask_is_made_of_blocks(mask):
    blocks = blocks_of(mask)
    assert torch.equal(cover(blocks, tuple(mask.shape)), mask)
    rows = [row for block in blocks for row in block.rows.tolist()]
    assert sorted(rows) == mask.any(1).nonzero().flatten().tolist()
    assert len({tuple(b.columns.tolist()) for b in blocks}) == len(blocks)


def test_split_rows():
    blocks = [DenseBlock(torch.arange(n), torch.arange(3)) for n in (5, 32, 64, 70, 33)]
    sizes = [b.rows.numel() for b in split_rows(blocks)]
    assert sizes == [5, 32, 64, 64, 6, 32, 1]
    assert torch.equal(cover(split_rows(blocks[3:4]), (70, 3)), torch.ones(70, 3, dtype=torch.bool))
    with pytest.raises(InvalidValue, match="multiple"):
        split_rows(blocks, 0)
    with pytest.raises(InvalidValue, match=r"row numbers 4\.\.4"):
        cover([DenseBlock(torch.tensor([4]), torch.tensor([0]))], (4, 4))


# -- masks of models ----------------------------------------------------------------------------------------------


def test_masks_of_models_and_their_density():
    model = create("vgg-small", num_classes=10, input_shape=(3, 8, 8), width=8, seed=0)
    before = Masks({n: random_matrix(1, m.numel(), 0.3, 5).reshape(m.shape) for n, m in Masks.full(model).items()})
    addresses = prunable(model)
    after = regroup_masks(before, addresses)
    kept = 0
    for name, address in addresses.items():
        blocks = blocks_of(address.rows(after[name]))
        assert len({r for b in blocks for r in b.rows.tolist()}) == sum(b.rows.numel() for b in blocks)
        assert 1 <= len(blocks) <= address.outputs // 2
        kept += sum(b.size for b in blocks)
    assert after.kept == kept
    assert after.density == kept / after.total
    assert after.density == pytest.approx(before.density, abs=0.02)
    # Fill-in raises the density, cutting isolated weights lowers it.
    assert regroup_masks(before, addresses, min_nonzeros=1).density > before.density + 0.1
    # Without any block a tensor keeps its mask.
    assert regroup_masks(before, addresses, min_nonzeros=1000) == before
    with pytest.raises(MaskMismatch, match="belongs to no tensor"):
        regroup_masks(before, {})


def test_groups_of_a_convolution_share_no_block():
    layer = nn.Conv2d(8, 8, 3, groups=2)
    address = prunable(layer)["weight"]
    pattern = torch.zeros(8, 36, dtype=torch.bool)
    pattern[[0, 2, 5, 7], :6] = True  # equal columns in both groups, but other inputs
    pattern[[1, 3], 6:9] = True
    before = Masks({"weight": address.unrows(pattern)})
    after = regroup_masks(before, {"weight": address}, clusters=2, min_nonzeros=2)
    assert after == before
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    lonely = Masks({"weight": random_matrix(6, 9, 0.5, 0).reshape(6, 1, 3, 3)})
    assert regroup_masks(lonely, prunable(depthwise)) == lonely


# -- running blocks -----------------------------------------------------------------------------------------------


def masked_output(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        whole = layer.weight.clone()
        layer.weight.mul_(mask)
        result = layer(x)
        layer.weight.copy_(whole)
    return result


LAYERS = {
    "plain": (nn.Conv2d(5, 12, 3), (2, 5, 7, 6)),
    "strided": (nn.Conv2d(4, 10, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (3, 4, 9, 8)),
    "same": (nn.Conv2d(4, 9, 3, padding="same", padding_mode="reflect"), (1, 4, 6, 6)),
    "grouped": (nn.Conv2d(6, 12, 3, padding=1, groups=3), (2, 6, 5, 5)),
    "pointwise": (nn.Conv2d(16, 40, 1), (2, 16, 3, 3)),
    "linear": (nn.Linear(20, 48), (4, 3, 20)),
    "no bias": (nn.Linear(20, 48, bias=False), (20,)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("structure", ["regroup", "unstructured", "empty"])
def test_blocks_equal_the_masked_layer(name, structure):
    layer, shape = LAYERS[name]
    address = prunable(layer)["weight"]
    mask = random_matrix(1, layer.weight.numel(), 0.4, 3).reshape(layer.weight.shape)
    if structure == "regroup":
        mask = regroup_masks(Masks({"weight": mask}), {"weight": address}, clusters=3)["weight"]
    elif structure == "empty":
        mask = torch.zeros_like(mask)
    x = torch.randn(shape, generator=seeded(4))
    expected = masked_output(layer, x, mask)
    for multiple in (None, 2):
        found = block_forward(layer, x, mask, multiple=multiple)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # A wrong mask is noticed by this comparison.
    assert structure == "empty" or not torch.allclose(block_forward(layer, x, ~mask), expected, atol=1e-3)


def test_a_whole_convolution_in_float64():
    layer = nn.Conv2d(8, 16, 3, padding=1).double()
    mask = regroup_masks(
        Masks({"weight": random_matrix(16, 72, 0.3, 1).reshape(16, 8, 3, 3)}), prunable(layer), clusters=4
    )["weight"]
    x = torch.randn(2, 8, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(block_forward(layer, x, mask), masked_output(layer, x, mask), rtol=1e-12, atol=1e-12)


def test_entries_outside_blocks_are_never_read():
    weight = torch.full((3, 4), float("nan"))
    weight[:2, 1:3] = torch.tensor([[1.0, 2], [3, 4]])
    x = torch.tensor([[9.0], [1], [1], [9]])
    found = block_matmul(weight, x, [DenseBlock(torch.tensor([0, 1]), torch.tensor([1, 2]))])
    assert found.flatten().tolist() == [3, 7, 0]


def test_execution_refuses():
    with pytest.raises(InvalidValue, match="do not fit"):
        block_matmul(torch.ones(2, 3), torch.ones(4, 5), [])
    layer = nn.Conv2d(2, 2, 3)
    full = torch.ones(2, 2, 3, 3, dtype=torch.bool)
    with pytest.raises(MaskMismatch, match="shape"):
        block_forward(layer, torch.ones(1, 2, 5, 5), full[:1])
    with pytest.raises(InvalidValue, match="N, C, H, W"):
        block_forward(layer, torch.ones(2, 5, 5), full)
    with pytest.raises(Unsupported, match="Conv1d"):
        block_forward(nn.Conv1d(2, 2, 3), torch.ones(1, 2, 5), full)


# -- tickets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_nonzeros": 2, "clusters": 3},
        {"min_nonzeros": "covering", "passes": 1, "partition": "jaccard"},
        {"min_rows": 3, "min_columns": 5},
    ],
)
def test_a_regrouped_ticket_runs_block_by_block(options):
    run = normed_run(epochs=1)
    run.make_model = lambda seed: create("vgg-small", num_classes=4, input_shape=(1, 6, 6), width=8, seed=seed)
    found = structure_lth(run.within("m"), conversion="regroup", sparsity=0.6, rate=0.4, **options)
    masks, layers = found.state.masks, found.details["layers"]
    assert found.details["sparsity"] == masks.sparsity
    assert found.details["options"]["clusters"] == options.get("clusters", 8)
    model = found.state.model(run).eval()
    assert set(masks) == set(targets(run)) == set(layers)
    for name, row in layers.items():
        blocks = blocks_of(masks[name].movedim(1, -1).flatten(1))
        assert row["blocks"] == len(blocks)
        assert row["density"] == sum(b.size for b in blocks) / masks[name].numel()
        layer = model.get_submodule(name.removesuffix(".weight"))
        x = torch.randn(2, layer.in_channels, 4, 4, generator=seeded(0))
        torch.testing.assert_close(block_forward(layer, x, masks[name]), layer(x), rtol=1e-5, atol=1e-5)

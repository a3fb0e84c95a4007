"""The models of examples/pointclouds, their scans and their measures: each against what it says it is."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import undula
from tests.support.numbers import shake
from undula import LoRA

EXAMPLES = str(Path(__file__).parents[2] / "examples" / "pointclouds")
sys.path.insert(0, EXAMPLES)
import boxes  # noqa: E402
import fitting  # noqa: E402
import forest  # noqa: E402
import instances  # noqa: E402
import lion  # noqa: E402
import scan  # noqa: E402
import scenes  # noqa: E402
import unet  # noqa: E402
import voxels  # noqa: E402
import windows  # noqa: E402

sys.path.remove(EXAMPLES)
sys.path.remove(str(Path(EXAMPLES).parents[1] / "bench"))  # of fitting
pytestmark = pytest.mark.usefixtures("float64")
close = torch.testing.assert_close


def occupied(number=40, scenes=2, size=(5, 4, 6), seed=0):
    """A grid with so many cells of each scene, drawn at random."""
    draws = torch.Generator().manual_seed(seed)
    parts = []
    for b in range(scenes):
        flat = torch.randperm(math.prod(size), generator=draws)[:number]
        x, y, z = flat // (size[1] * size[2]), flat // size[2] % size[1], flat % size[2]
        parts.append(torch.stack([torch.full_like(x, b), x, y, z], dim=1))
    return voxels.Grid(torch.cat(parts), size)


def test_a_submanifold_convolution_is_the_dense_one_at_occupied_cells():
    """Of each scene by itself, at the borders too; and so it is with an adapter."""
    torch.manual_seed(0)
    grid, dense = occupied(), nn.Conv3d(3, 4, 3, padding=1)
    conv, x = voxels.SubmanifoldConv.from_dense(dense), torch.randn(len(grid), 3)
    volume = torch.zeros(2, 3, *grid.size)
    b, *at = grid.places.unbind(1)
    volume[b, :, *at] = x
    close(conv(x, grid), dense(volume)[b, :, *at])
    shake(undula.attach(conv, LoRA(r=2), "kernel"))
    live = conv(x, grid)
    with torch.no_grad():
        new = undula.adapters(conv)["default"].delta("kernel") + conv.kernel.weight
        dense.weight.copy_(new.unflatten(1, (3, 3, 3, 3)).permute(0, 4, 1, 2, 3))
    close(live, dense(volume)[b, :, *at])


def test_a_grid_refuses_a_cell_twice_and_finds_what_is_there():
    with pytest.raises(ValueError, match="a cell stands twice"):
        voxels.Grid(torch.zeros(2, 4, dtype=torch.long), (2, 2, 2))
    grid = occupied()
    assert torch.equal(grid.find(grid.places), torch.arange(len(grid)))
    inside = {tuple(p) for p in grid.places.tolist()}
    free = torch.tensor([p for p in np.ndindex(2, 5, 4, 6) if p not in inside])
    assert set(grid.find(free).tolist()) == {len(grid)}
    above, parent = grid.coarser
    assert torch.equal(above.places[parent][:, 1:], grid.places[:, 1:] // 2)
    rows, row = voxels.unique_rows(grid.places[:, 1:] - 2)
    wanted, which = torch.unique(grid.places[:, 1:] - 2, dim=0, return_inverse=True)
    assert torch.equal(rows, wanted)
    assert torch.equal(row, which)


@pytest.mark.parametrize("tokens", [1, 7, 8, 29])
def test_the_scan_in_chunks_is_the_recurrence(tokens):
    """Gradients too, and decays as small as exp(-200)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, tokens, 2, 3, requires_grad=True)
    log_a = (-torch.rand(2, tokens, 2) * torch.tensor([0.1, 200.0])).requires_grad_()
    wanted, found = scan.naive(q, k, v, log_a), scan.chunked(q, k, v, log_a, chunk=8)
    close(found, wanted)
    weights = torch.randn_like(wanted)
    inputs = (q, k, v, log_a)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("decay", ["input", "fixed"])
def test_a_mixer_passes_over_padding(decay):
    """What stands behind a sequence's end changes none of its outputs, in either direction."""
    torch.manual_seed(0)
    mixer, x = scan.TokenMixer(8, 4, decay, chunk=4), torch.randn(1, 10, 8)
    there = torch.ones(1, 10, dtype=torch.bool)
    padded = torch.cat([x, torch.randn(1, 3, 8)], dim=1)
    close(mixer(padded, nn.functional.pad(there, (0, 3)))[:, :10], mixer(x, there))
    first = torch.autograd.grad(mixer(x.requires_grad_(), there)[0, 4].sum(), x)[0][0].abs().sum(1)
    assert (first > 0).all()  # each token hears those before and those behind it


@pytest.mark.parametrize("axis", ["x", "y"])
def test_windows_hold_each_voxel_once_and_scenes_apart(axis):
    grid = occupied(number=45)
    groups = windows.Groups(grid.places, (2, 2), 16, axis)
    rows = torch.arange(1, len(grid) + 1.0)[:, None]
    seen = groups.split(rows)
    assert torch.equal(groups.join(seen), rows)
    assert torch.equal(seen[..., 0] > 0, groups.there_GT)
    assert seen.shape == (6, 16, 1)
    order = seen[groups.there_GT][:, 0].long() - 1
    b, x, y, _ = grid.places[order].unbind(1)
    along, across = (x, y) if axis == "x" else (y, x)
    keys = list(zip(*(t.tolist() for t in (b, along // 2, across // 2, along % 2, across % 2)), strict=True))
    assert keys == sorted(keys)
    assert all(
        len(set(grid.places[g[m][:, 0].long() - 1, 0].tolist())) == 1
        for g, m in zip(seen, groups.there_GT, strict=True)
    )


def test_generated_voxels_are_new_and_empty_and_stand_around_the_foreground():
    torch.manual_seed(0)
    grid = occupied(number=20)
    x = torch.rand(len(grid), 3)
    wider, more = lion.generated(x, grid, 0.2)
    close(wider[more.find(grid.places)], x)
    new = torch.ones(len(more), dtype=torch.bool)
    new[more.find(grid.places)] = False
    assert 0 < new.sum() <= 2 * 4 * 4
    assert (wider[new] == 0).all()
    strong = torch.cat(
        [
            grid.places[rows[x[rows].mean(1).topk(4).indices]]
            for b in range(2)
            for rows in [(grid.places[:, 0] == b).nonzero()[:, 0]]
        ]
    )
    for place in more.places[new]:
        step = (strong - place).abs()
        assert ((step == torch.tensor([0, 1, 1, 0])).all(1)).any()


def inside(points, box):
    """Whether points are within a box, by its own axes."""
    c, s = math.cos(box[6]), math.sin(box[6])
    local = (points - box[:3]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return (abs(local) < box[3:6] / 2 - 1e-6).all(-1)


def test_a_scan_sees_nothing_behind_a_box():
    """Between the sensor and a return no step of the way is within a box; and a box behind another has fewer returns
    than it has alone."""
    sensor = scenes.Sensor(16, -15, 15, columns=64, noise=0.0)
    seen = scenes.scene(3, sensor)
    steps = np.linspace(0.02, 0.999, 200)[:, None, None]
    for box in seen.boxes:
        assert not inside(steps * seen.points, box).any()
    car = np.array([12.0, 0, -1, 4, 2, 1.6, 0.4])
    wall = np.array([6.0, 0, -0.6, 0.5, 1.5, 2.4, 0.0])
    rays = sensor.directions()
    alone, behind = scenes.cast(rays, car[None])[1], scenes.cast(rays, np.stack([car, wall]))[1]
    assert 0 < (behind == 0).sum() < (alone == 0).sum()
    assert (alone[behind == 0] == 0).all()


def test_a_return_is_where_the_box_is_and_rarer_from_afar():
    box = np.array([10.0, 0, 0, 2, 2, 2, 0.0])
    reach, what = scenes.cast(np.array([[1.0, 0, 0], [0, 1, 0], [0.6, 0, -0.8]]), box[None])
    assert what.tolist() == [0, -1, -1]
    assert reach.tolist() == [9.0, math.inf, pytest.approx(1.8 / 0.8)]
    found = [scenes.scene(5, scenes.Sensor(32, -15, 2, half=half)) for half in (5, 45)]
    assert np.array_equal(found[0].boxes, found[1].boxes)
    assert len(found[0].points) < len(found[1].points)


def test_precision_by_hand():
    """Two boxes and one; the first answer is right, the second a second time the same box, the third right, one box is
    missed: precision 1 at recall 1/3, 2/3 at recall 2/3."""
    true = [torch.tensor([[0.0, 0], [10, 0]]), torch.tensor([[5.0, 5]])]
    said = [
        (torch.tensor([[0.1, 0], [0.2, 0], [10.3, 0]]), torch.tensor([0.9, 0.8, 0.7])),
        (torch.zeros(0, 2), torch.zeros(0)),
    ]
    scores, right = boxes.matches(said, true, 0.5)
    assert right.tolist() == [True, False, True]
    assert boxes.average_precision(scores, right, 3) == pytest.approx(1 / 3 + 2 / 3 / 3)
    assert boxes.average_precision(*boxes.matches(said, true, 0.05), 3) == 0.0
    assert boxes.matches([(torch.zeros(1, 2), torch.ones(1))], [torch.zeros(0, 2)], 1.0)[1].tolist() == [False]


def test_boxes_come_back_from_their_fields():
    """What the head should say, read as it is read, is the box; and the mirror image of a scan has mirrored boxes."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    s = boxes.sample(7, 16)

    class Perfect(nn.Module):
        def forward(self, features, grid):
            heat, box = torch.full((1, 2, 50, 50), -9.0), torch.zeros(1, lion.FIELDS, 50, 50)
            at, values = boxes.fields(s.boxes)
            for (x, y), k, f in zip(at, s.classes, values, strict=True):
                heat[0, k, x, y], box[0, :, x, y] = 9.0, f
            return heat, box

    found, kinds, scores = boxes.found(Perfect(), [s])[0]
    for box, kind in zip(found[scores > 0.5], kinds[scores > 0.5], strict=True):
        true = s.boxes[s.classes == kind]
        nearest = true[(true[:, :2] - box[:2]).norm(dim=1).argmin()]
        close(box[:6], nearest[:6], rtol=1e-4, atol=1e-4)
        assert abs(math.sin(box[6] - nearest[6])) < 1e-3
    assert boxes.measure(Perfect(), [s])["AP"] == pytest.approx(1.0)
    twice = boxes.mirrored(boxes.mirrored(s))
    assert torch.equal(twice.cells, s.cells)
    assert torch.equal(twice.boxes, s.boxes)


def test_thinning_keeps_the_tree_of_each_point():
    whole = forest.plot(1)
    known = {tuple(p): i for p, i in zip(whole.points.tolist(), whole.instance.tolist(), strict=True)}
    thin = forest.thinned(whole, 10, np.random.default_rng(0))
    assert len(thin.points) == 10 * forest.SIDE**2
    assert len({tuple(p) for p in thin.points.tolist()}) == len(thin.points)
    assert all(known[tuple(p)] == i for p, i in zip(thin.points.tolist(), thin.instance.tolist(), strict=True))
    assert len(set(thin.instance.tolist())) > 5


def test_trees_are_counted_by_hand():
    """One tree is found, of another two thirds (4 of 6), of a third a half, which is not enough; one is invented."""
    true = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, -1, -1])
    found = np.array([5, 5, 5, 7, 7, 7, 7, -1, -1, 3, -1, -1, 9])
    assert instances.matched(found, true) == (2, 4, 3)
    assert instances.f1([(2, 4, 3), (1, 1, 2)]) == pytest.approx(6 / 10)
    assert instances.matched(np.full(4, -1), np.array([0, 0, -1, 1])) == (0, 0, 2)


def test_voxels_vote_and_clusters_of_perfect_heads_are_the_trees():
    torch.set_default_dtype(torch.float32)
    assert unet.voted(np.array([3, 3, -1, -1, 2]), np.array([0, 0, 0, 1, 1]), 2).tolist() == [3, -1]
    plot = forest.plot(2, 100)
    cloud = unet.Cloud(plot)
    tree = (cloud.instance != forest.NONE).nonzero()[:, 0]
    heads = tree.numpy(), (cloud.middles + cloud.step)[tree, :2], torch.zeros(len(tree), 1)
    counts = instances.matched(instances.clusters(heads, cloud, instances.Clustering(0.0, 10)), plot.instance)
    assert instances.f1([counts]) > 0.9


def models():
    torch.manual_seed(0)
    grid = occupied(number=60, size=(8, 8, 4))
    detector = lion.Detector(6, lion.Shape(width=8, heads=2, fine=(4, 16), coarse=(2, 8)))
    return {
        "detector": (detector, torch.randn(len(grid), 6), grid, ["head.first"]),
        "trees": (unet.TreeNet(4), torch.randn(len(grid), unet.FEATURES), grid, []),
    }


@pytest.mark.parametrize("kind", ["detector", "trees"])
def test_adapters_on_the_models_train_and_merge(kind):
    """Each site gets a gradient, merged is live, and without the adapter the base is there to the bit."""
    model, x, grid, more = models()[kind]
    base = [y.detach() for y in model(x, grid)]
    adapter = undula.attach(model, LoRA(r=2), where=["all-linear", *more])
    close([y.detach() for y in model(x, grid)], base)
    assert sum(name.endswith("kernel") for name in adapter.factors) == {"detector": 4, "trees": 10}[kind]
    shake(adapter, 0.02)
    live = model(x, grid)
    sum(y.square().sum() for y in live).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    undula.merge(model)
    close([y.detach() for y in model(x, grid)], [y.detach() for y in live])
    undula.unmerge(model)
    undula.select(model, None)
    assert all(torch.equal(a, b) for a, b in zip(model(x, grid), base, strict=True))


def test_a_quick_run_writes_over_nothing_that_a_whole_one_left(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["detect.py", "--json", "kept/found.json"])
    whole = fitting.arguments("", "detect")
    assert str(whole.json) == str(Path("kept/found.json"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--quick"])
    quick = fitting.arguments("", "detect")
    assert quick.json == Path("kept/quick-found.json")
    assert not {quick.work, quick.json, quick.figure} & {whole.work, whole.json, whole.figure}
    assert quick.work not in whole.work.parents

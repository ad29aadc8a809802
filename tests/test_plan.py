"""Proposals for volumes, and their networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import refused, run_command
from hydra import compose, initialize_config_dir
from torch import nn
from volume_files import folders

from lightning_dice.cli.config import CONF_DIR, instantiate, register_resolvers
from lightning_dice.losses import DeepSupervision
from lightning_dice.models import DynUNet
from lightning_dice.models.planner import GIB, Topology, first_patch, plan_topology, propose, step_memory

RNG = np.random.default_rng(0)
GRIDS = [
    ((1.0, 1.0, 1.0), (40, 56, 40)),
    ((0.5, 0.5, 5.0), (256, 256, 24)),
    ((3.0, 0.7, 0.7), (13, 200, 128)),
    *[(tuple(RNG.uniform(0.3, 6, 3)), tuple(int(n) for n in RNG.integers(5, 200, 3))) for _ in range(30)],
    *[(tuple(RNG.uniform(0.3, 3, 2)), tuple(int(n) for n in RNG.integers(16, 600, 2))) for _ in range(5)],
]


@pytest.mark.parametrize(("spacing", "size"), GRIDS, ids=lambda grid: "x".join(f"{n:.3g}" for n in grid))
def test_levels_agree_with_nnunet(spacing, size):
    peer = pytest.importorskip("nnunetv2.experiment_planning.experiment_planners.network_topology")
    _, strides, kernels, padded, divisors = peer.get_pool_and_conv_props(spacing, size, 4, 999999)
    mine = plan_topology(spacing, size)
    assert mine.strides == strides
    assert mine.kernels == kernels
    assert mine.size == tuple(padded)
    assert mine.divisors == tuple(divisors)


def test_the_first_patch_is_isotropic():
    assert first_patch((1, 1, 1), (512, 512, 512)) == (256, 256, 256)
    patch = first_patch((1, 1, 4), (999, 999, 999))
    assert np.prod(patch) == pytest.approx(256**3, rel=0.01)
    assert [n * step for n, step in zip(patch, (1, 1, 4), strict=True)] == pytest.approx([406] * 3, abs=2)
    assert first_patch((1, 1, 1), (300, 40, 300)) == (256, 40, 256)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv3d(4, 2, 1, bias=False))


def test_memory_of_a_step():
    """Two convolutions and a ReLU, by hand: the image and the ReLU's output, both again as gradients; the weights."""
    voxels, weights = 8 * 8 * 8, 4 * 27 + 8
    kept = voxels * (1 + 4) * 4
    expected = 1.2 * (4 * 4 * weights + 3 * (kept + kept))
    assert step_memory(convolutions, 1, (8, 8, 8), 3) == pytest.approx(expected, abs=1)


def make(shape: Topology) -> nn.Module:
    return nn.Conv3d(1, 8, shape.kernels[0], padding=[k // 2 for k in shape.kernels[0]])


class TestPropose:
    def test_a_small_image_is_the_patch(self):
        found = propose((1, 1, 1), (35, 50, 36), 180, make, 1, 8 * GIB)
        assert found.topology.size == (40, 56, 40)
        assert found.batch_size == round(0.05 * 180 * 35 * 50 * 36 / (40 * 56 * 40))  # 5 % of the voxels
        assert propose((1, 1, 1), (35, 50, 36), 4, make, 1, 8 * GIB).batch_size == 2

    @pytest.mark.parametrize("mib", [16, 40, 200])
    def test_the_proposal_fits_and_a_larger_batch_would_not(self, mib):
        found = propose((1, 1, 2), (300, 280, 150), 1000, make, 1, mib * 2**20)
        assert found.memory <= mib * 2**20
        size, divisors = found.topology.size, found.topology.divisors
        assert found.memory == step_memory(lambda: make(found.topology), 1, size, found.batch_size)
        larger = step_memory(lambda: make(found.topology), 1, size, found.batch_size + 1)
        assert larger > mib * 2**20
        assert all(n % d == 0 for n, d in zip(size, divisors, strict=True))
        shares = [n / m for n, m in zip(size, (300, 280, 150), strict=True)]
        assert max(shares) - min(shares) < 0.35  # the image's proportions are kept, to a step

    def test_too_little_memory(self):
        with pytest.raises(ValueError, match="memory must be more: a batch of 2 patches"):
            propose((1, 1, 1), (64, 64, 64), 10, make, 1, 1000)


class TestCommand:
    def test_it_writes_an_experiment_once(self, tmp_path):
        folders(tmp_path / "data", {"train": 3, "val": 1}, np.diag([1, 1, 4, 1.0]), size=(20, 20, 9))
        data = ["data=volumes", "data.root=data", "data.classes=[background,front,back]", "memory=1"]
        output = run_command("plan", *data, cwd=tmp_path).out
        assert "median image 20x20x9 at 1x1x4 mm" in output
        assert "data.patch_size=[20,20,9]" in output
        register_resolvers()
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose("fit", overrides=[f"hydra.searchpath=[{tmp_path}/plan]", "experiment=plan", "folder=run"])
        assert config.data.root == str(tmp_path / "data")
        assert config.data.classes == ["background", "front", "back"]
        assert (list(config.data.patch_size), config.data.batch_size, config.data.spacing) == (
            [20, 20, 9],
            2,
            [1, 1, 4],
        )
        net = instantiate(config.model, "model").eval()
        assert net(torch.zeros(1, 1, 20, 20, 9)).shape == (1, 3, 20, 20, 9)
        told = refused("plan", *data, cwd=tmp_path)
        assert "plan.yaml exists; choose another output, or set overwrite=true" in told

    def test_a_typo_is_explained_as_in_fit(self, tmp_path):
        output = refused("plan", "data=volumes", "data.rot=data", cwd=tmp_path)
        assert "; did you mean root?" in output
        assert "Could not override 'data.rot'" in output


SMALL = {
    "monai_unet": ["model.channels=[4,8]", "model.strides=[2]", "module.size_divisor=2"],
    "attention_unet": ["model.channels=[4,8]", "model.strides=[2]", "module.size_divisor=2"],
    "dynunet": [
        "model.filters=[4,4,8,8]",
        "model.strides=[1,2,2,2]",
        "model.kernel_size=[3,3,3,3]",
        "module.size_divisor=8",
    ],
    "segresnet": ["model.init_filters=8", "model.blocks_down=[1,1]", "model.blocks_up=[1]", "module.size_divisor=2"],
    "swinunetr": ["model.feature_size=12", "data.patch_size=[64,32,32]"],
    "unetr": ["model.feature_size=4", "model.hidden_size=12", "model.mlp_dim=12"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "swinunetr" else name for name in SMALL]
)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")
def test_networks_take_a_step_in_three_dimensions(name):
    register_resolvers()
    cube = [] if name == "swinunetr" else ["data.patch_size=[32,32,32]"]
    overrides = [f"model={name}", *cube, *SMALL[name], "data.channels=2", "data.classes=[a,b]"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("fit", overrides=[*overrides, "data.activation=softmax", "loss=dice_ce"])
    torch.manual_seed(0)
    module = instantiate(config.module, "module")
    size = (config.data.patch_size[0], 32, 30)
    image, mask = torch.randn(1, 2, *size), torch.randint(0, 2, (1, *size))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    loss_of = DeepSupervision(module.loss)
    losses = []
    for _ in range(2):
        levels = module.levels(image)
        assert len(levels) == (3 if name == "dynunet" else 1)
        padded = nn.functional.pad(mask, (0, levels[0].shape[-1] - 30), value=255)
        loss = loss_of(levels, padded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    unused = {key for key, parameter in module.named_parameters() if parameter.grad is None}
    assert all("cross_attn." in key or ".vit.norm." in key for key in unused)
    assert not unused or name == "unetr"
    with torch.no_grad():
        assert module.eval()(image).shape == (1, 2, *size)


def test_deep_supervision_agrees_with_monai():
    """The same weights give MONAI's levels, which are enlarged and stacked there; and the network can be copied."""
    import copy

    from monai.networks.nets import DynUNet as Peer

    shape = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "filters": [4, 4, 8, 8], "norm_name": "instance"}
    deep = {"deep_supervision": True, "deep_supr_num": 2}
    settings = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **shape, **deep}
    torch.manual_seed(0)
    mine, peer = DynUNet(**settings), Peer(**settings, upsample_kernel_size=[2, 2, 2])
    peer.load_state_dict(mine.state_dict())
    image = torch.randn(2, 1, 16, 16)
    levels, stacked = mine(image), peer(image)
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 16), (8, 8), (4, 4)]
    for index, level in enumerate(levels):
        assert torch.equal(nn.functional.interpolate(level, size=(16, 16)), stacked[:, index])
    again = copy.deepcopy(mine)(image)
    assert all(torch.equal(a, b) for a, b in zip(levels, again, strict=True))

"""One process, two or three, with any share of the images: the same loss, gradient, scores and table of cases."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_dice import DiceLoss, DiceScore, SegmentationModule
from lightning_dice.callbacks import CaseTable
from lightning_dice.data import Batch, SegmentationData, SyntheticSource
from lightning_dice.losses import DiceCELoss, TverskyLoss

IMAGES, CLASSES = 6, ["background", "nerve", "vessel"]
SPLITS: dict[int, dict[str, tuple[int, ...]]] = {
    1: {"equal": (6,)},
    2: {"equal": (3, 3), "unequal": (5, 1), "empty rank": (6, 0)},
    3: {"equal": (2, 2, 2), "unequal": (3, 2, 1), "empty rank": (4, 2, 0)},
}
LOSSES = {"dice": DiceLoss, "dice+ce": DiceCELoss, "tversky": TverskyLoss}


class Setting(NamedTuple):
    """One row of the table."""

    loss: str
    pool: str
    ignored: bool

    def make(self) -> nn.Module:
        return LOSSES[self.loss](activation="softmax", pool=self.pool, ignore_index=255 if self.ignored else None)


SETTINGS = [Setting(*row) for row in itertools.product(LOSSES, ("image", "batch"), (False, True))]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
# Ways to take a step beside DDP's plain one: with a loss that sums before its formula, and one that also does after it.
MODES = [
    (name, setting, kind)
    for name in ("accumulated", "bfloat16", "compiled loss", "compiled module", "compiled ddp", "fully_shard", "fsdp")
    for setting in (Setting("dice", "batch", True), Setting("dice+ce", "image", True))
    for kind in ("equal", "unequal")
    if not (name == "accumulated" and kind == "unequal")  # which would leave a process without an image
]


def case(ignored: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and class ids; no pixel of the vessel in the first half, and one image that is ignored altogether."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(IMAGES, 2, 7, 5, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 3, (IMAGES, 7, 5), generator=generator)
    mask[:3][mask[:3] == 2] = 0
    if ignored:
        mask = mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.3, 255)
        mask[3] = 255
    return image.to(dtype), mask


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    made = nn.Conv2d(2, 3, 1)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made.to(dtype)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def step(model: nn.Module, loss: nn.Module, image: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    value = loss(model(image), mask)
    value.backward()
    return value.item(), gradient(model)


class Table(CaseTable):
    """Without the picture, which would take most of the time."""

    def _draw(self, *_: Any) -> None:
        pass


def evaluated(setting: Setting, folder: Path, rank: int = 0, split: tuple[int, ...] = (IMAGES,)) -> dict[str, Any]:
    """What a validation logs and writes; each process has its images in one batch."""
    image, mask = case(setting.ignored)
    names = [f"case {index}" for index in range(IMAGES)]
    first = sum(split[:rank])
    mine = slice(first, first + split[rank])
    ignore_index = 255 if setting.ignored else None
    facts: dict[str, Any] = {"activation": "softmax", "ignore_index": ignore_index, "exclude_classes": [0]}
    module = SegmentationModule(
        net(), setting.make(), DiceScore(3, average="none", **facts), class_names=CLASSES, activation="softmax"
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=len(split),
        strategy="ddp" if dist.is_initialized() else "auto",
        precision="64-true",
        use_distributed_sampler=False,
        callbacks=[Table(folder, CLASSES, **facts)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [Batch(image[mine], mask[mine], names[mine])]
    (logged,) = trainer.validate(module, DataLoader(batches, batch_size=None, collate_fn=unchanged), verbose=False)
    if rank:
        return {"logged": logged}
    with (folder / "cases.csv").open() as file:
        return {"logged": logged, "table": list(csv.DictReader(file))}


def unchanged(batch: Batch) -> Batch:
    return batch


def mode(name: str, setting: Setting, rank: int, split: tuple[int, ...]) -> Any:
    """A step in another way, on images shared out by `split`."""
    image, mask = (tensor.split(split)[rank] for tensor in case(setting.ignored))
    loss, model = setting.make(), net()
    if name == "accumulated":
        ddp = DistributedDataParallel(model)
        with ddp.no_sync():
            (loss(ddp(image[:1]), mask[:1]) / 2).backward()
        (loss(ddp(image[1:]), mask[1:]) / 2).backward()
        return gradient(model)
    if name == "bfloat16":
        ddp = DistributedDataParallel(net(torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            logits = ddp(image.float())
            logits.retain_grad()
            value = loss(logits, mask)
        value.backward()
        # The weights' gradients are summed in half precision: those of the logits tell more. DDP divides them.
        return value.item(), logits.grad.float() / len(split)
    if name.startswith("compiled"):
        torch._dynamo.reset()
        ddp = DistributedDataParallel(model)
        if name == "compiled loss":
            return step(ddp, torch.compile(loss, fullgraph=True, backend="aot_eager"), image, mask)
        if name == "compiled ddp":
            return step(torch.compile(ddp, backend="aot_eager"), loss, image, mask)
        both = torch.compile(
            lambda image, mask: loss(model(image), mask), fullgraph=True, backend="aot_eager", dynamic=True
        )
        value = both(image, mask)
        value.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        return value.item(), gradient(model) / len(split)
    if name == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (len(split),)))
        value = loss(model(image), mask)
        value.backward()
        return value.item(), torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)
    value = loss(sharded(image), mask)
    value.backward()
    (flat,) = (parameter.grad for parameter in sharded.parameters())
    parts = [torch.empty_like(flat) for _ in split]
    dist.all_gather(parts, flat)
    return value.item(), torch.cat(parts)[: sum(parameter.numel() for parameter in net().parameters())]  # and padding


def worker(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    os.environ["LOCAL_RANK"] = str(rank)  # Lightning then takes the processes for started.
    results: dict[Any, Any] = {}
    for (kind, split), setting in itertools.product(SPLITS[world].items(), SETTINGS):
        for dtype in TOLERANCE:
            image, mask = (tensor.split(split)[rank] for tensor in case(setting.ignored, dtype))
            results[kind, setting, dtype] = step(DistributedDataParallel(net(dtype)), setting.make(), image, mask)
        results[kind, setting] = evaluated(setting, folder, rank, split)
    if world == 2:
        for name, setting, kind in MODES:
            results[name, setting, kind] = mode(name, setting, rank, SPLITS[world][kind])
    torch.save(results, folder / f"{rank}.pt")
    # A process that ends while the other still talks to it may be killed by torch's own threads.
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every rank of each number of processes came to."""
    by_world = {}
    for world in SPLITS:
        folder = tmp_path_factory.mktemp(f"world-{world}")
        mp.start_processes(worker, (world, folder), nprocs=world, start_method="spawn")
        by_world[world] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return by_world


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the validation of a setting comes to without any distribution."""
    return {setting: evaluated(setting, tmp_path_factory.mktemp("plain")) for setting in SETTINGS}


each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting)))
each_share = pytest.mark.parametrize(
    ("world", "kind"), [(world, kind) for world, kinds in SPLITS.items() for kind in kinds]
)


@each_share
@each_setting
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradient(found, world, kind, setting, dtype):
    value, weights = step(net(dtype), setting.make(), *case(setting.ignored, dtype))
    near = TOLERANCE[dtype]
    for result in found[world]:
        assert result[kind, setting, dtype][0] == pytest.approx(value, rel=near)
        torch.testing.assert_close(result[kind, setting, dtype][1], weights, rtol=near, atol=near)


@each_share
@each_setting
def test_scores_and_table_of_cases(found, plain, world, kind, setting):
    expected = plain[setting]
    assert found[world][0][kind, setting]["table"] == expected["table"]
    assert len(expected["table"]) == IMAGES
    assert "val/dice" in expected["logged"]
    for result in found[world]:
        # The checkpoint and early stopping decide by these, on every rank alike.
        assert result[kind, setting]["logged"] == pytest.approx(expected["logged"], rel=1e-10)


@pytest.mark.parametrize(
    ("name", "setting", "kind"), MODES, ids=[f"{name}-{setting.loss}-{kind}" for name, setting, kind in MODES]
)
def test_in_another_way(found, name, setting, kind):
    image, mask = case(setting.ignored)
    loss, model = setting.make(), net()
    results = [result[name, setting, kind] for result in found[2]]
    if name == "accumulated":
        # The processes' first images make one batch, and the others the second one.
        first = torch.tensor([True, False, False] * 2)
        for some in (first, ~first):
            (loss(model(image[some]), mask[some]) / 2).backward()
        for result in results:
            torch.testing.assert_close(result, gradient(model), rtol=1e-10, atol=1e-12)
        return
    if name == "bfloat16":
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(torch.float32)(image.float())
            logits.retain_grad()
            value = loss(logits, mask)
        value.backward()
        assert [one for one, _ in results] == pytest.approx([value.item()] * 2, rel=1e-6)
        # Kept in bfloat16, of 8 bits: one step apart at most.
        torch.testing.assert_close(torch.cat([one for _, one in results]), logits.grad.float(), rtol=2**-7, atol=1e-9)
        return
    value, weights = step(model, loss, image, mask)
    for one, found_gradient in results:
        assert one == pytest.approx(value, rel=1e-10)
        torch.testing.assert_close(found_gradient, weights, rtol=1e-10, atol=1e-12)


# Batches of 12 images on any number of processes, and two cases to validate on: fewer than three processes.
GLOBAL_BATCH = [
    *("model=custom", "loss=dice_ce", "optimizer=sgd", "optimizer.lr=0.1", "scheduler=constant", "logger=csv"),
    *("data.patch_size=[32,32]", "data.cases={train:16,val:2,test:5}", "data.num_workers=0", "device=cpu"),
    *("trainer.max_epochs=2", "trainer.precision=64-true"),
]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def run_python(*arguments: object, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A training of each number of processes, by the command."""
    home = tmp_path_factory.mktemp("fitted")
    for world in (1, 2, 3):
        share = [f"data.batch_size={12 // world}", f"trainer.devices={world}", f"folder={world}"]
        strategy = [] if world == 1 else ["trainer.strategy=ddp"]
        run_python("-m", "lightning_dice.fit", *GLOBAL_BATCH, *share, *strategy, cwd=home)
    return home


@pytest.mark.parametrize("world", [2, 3])
class TestFit:
    def test_same_losses_and_scores_in_every_epoch(self, fitted, world):
        # Lightning's file has all digits.
        several, one = (self.logged(fitted / f"{folder}/logs/csv/version_0/metrics.csv") for folder in (world, 1))
        names = {"train/loss", "train/loss/dice", "train/loss/ce", "train/dice", "val/loss", "val/loss/ce", "val/dice"}
        assert {name for name, _ in one} >= names
        assert several == pytest.approx(one, rel=1e-10)

    def logged(self, path: Path) -> dict[tuple[str, str], float]:
        """Each metric of each epoch."""
        return {
            (name, row["epoch"]): float(value)
            for row in rows(path)
            for name, value in row.items()
            if name.startswith(("train/", "val/")) and value
        }

    def test_same_table_of_cases(self, fitted, world):
        table = rows(fitted / f"{world}/cases.csv")
        assert table == rows(fitted / "1/cases.csv")
        assert len(table) == 5

    @pytest.mark.parametrize("name", ["best", "last"])
    def test_same_weights(self, fitted, world, name):
        mine, other = (
            torch.load(fitted / folder / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]
            for folder in (str(world), "1")
        )
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
        assert mine["net.weight"].abs().sum() > 0


class Named(SegmentationModule):
    """Says which cases its predictions are of, and keeps what the rank has logged."""

    folder: Path

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Any:
        return list(batch.case), super().predict_step(batch, batch_idx)

    def on_fit_end(self) -> None:
        scores = {name: float(value) for name, value in self.trainer.callback_metrics.items() if "val/" in name}
        torch.save(scores, self.folder / f"scores-{self.trainer.global_rank}.pt")


class KeepPredictions(BasePredictionWriter):
    """Predictions of each rank, in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder
        self.kept: dict[str, Tensor] = {}

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        for name, mask in zip(*prediction, strict=True):
            assert name not in self.kept
            self.kept[name] = mask

    def on_predict_end(self, trainer, pl_module):
        torch.save(self.kept, self.folder / f"predictions-{trainer.global_rank}.pt")


def trained_and_predicted(folder: Path, **settings: Any) -> Named:
    """With batch norm, whose buffers DDP sends; three cases to validate on and five to predict, one in a batch."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = Named(nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)), DiceLoss(ignore_index=255))
    module.folder = folder
    source = SyntheticSource(size=(32, 32), cases=(8, 3, 5))
    data = SegmentationData(source, batch_size=2, eval_batch_size=1, num_workers=0, ignore_index=255)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[KeepPredictions(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, data)
    trainer.predict(module, data, return_predictions=False)
    return module


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_distributed import trained_and_predicted

if __name__ == "__main__":
    folder, strategy = sys.argv[1:]
    trained = trained_and_predicted(Path(folder), devices=2, strategy=strategy)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(trained.state_dict(), f"{{folder}}/weights.pt")
    if torch.distributed.is_initialized():
        # A process that ends while the other still talks to it may be killed by torch's own threads.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_more_batches_on_one_rank_and_each_case_predicted_once(tmp_path, strategy):
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    run_python("script.py", tmp_path, strategy, cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"scores-{rank}.pt", weights_only=True) for rank in range(2))
    assert "val/dice" in first
    assert first == second
    predictions = [torch.load(tmp_path / f"predictions-{rank}.pt", weights_only=True) for rank in range(2)]
    names = [name for one in predictions for name in one]
    assert names == [f"test-000{index}" for index in range(5)]
    # What the weights say of each case, without a Trainer.
    module = SegmentationModule(nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)), DiceLoss())
    module.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    module.eval()
    cases = SyntheticSource(size=(32, 32), cases=(8, 3, 5)).split("test")
    for index in range(5):
        image, _, name, *_ = cases[index]
        expected = module.predict_step(image.unsqueeze(0))[0]
        assert torch.equal({**predictions[0], **predictions[1]}[name], expected)

"""One process, two or three, with any share of the images: the same loss, gradient, scores and table of cases."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, Forked, forkserver, rank_environments, rows, run_command, run_ranks, shared
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_dice import DiceLoss, DiceScore, SegmentationModule
from lightning_dice.callbacks import CaseTable
from lightning_dice.data import Batch, SegmentationData, SyntheticSource
from lightning_dice.losses import DiceCELoss, TverskyLoss

pytestmark = pytest.mark.process

IMAGES, CLASSES = 6, ["background", "nerve", "vessel"]
SPLITS: dict[int, dict[str, tuple[int, ...]]] = {
    1: {"equal": (6,)},
    2: {"equal": (3, 3), "unequal": (5, 1), "empty rank": (6, 0)},
    3: {"unequal": (3, 2, 1), "empty rank": (4, 2, 0)},
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
# A loss that sums before its formula, and one that also does after it; all of them on two processes with unlike shares.
TWO = [Setting("dice", "batch", True), Setting("dice+ce", "image", True)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def settings(world: int, kind: str) -> list[Setting]:
    """Those that are tried on these shares."""
    return SETTINGS if (world, kind) == (2, "unequal") else TWO


# Ways to take a step beside DDP's plain one. Accumulation would leave a process without an image.
COMPILED = ("compiled loss", "compiled module", "compiled ddp")
MODES = [
    (name, setting, "equal" if name == "accumulated" else "unequal")
    for name in ("accumulated", "bfloat16", "fully_shard", "fsdp", *COMPILED)
    for setting in TWO
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
    return {"logged": logged} if rank else {"logged": logged, "table": rows(folder / "cases.csv")}


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


def taken(folder: Path) -> dict[Any, Any]:
    """On each rank: steps and scores of every setting."""
    world, rank = dist.get_world_size(), dist.get_rank()
    results: dict[Any, Any] = {}
    for kind, split in SPLITS[world].items():
        for setting in settings(world, kind):
            for dtype in TOLERANCE:
                image, mask = (tensor.split(split)[rank] for tensor in case(setting.ignored, dtype))
                model = DistributedDataParallel(net(dtype))
                results[kind, tuple(setting), dtype] = step(model, setting.make(), image, mask)
            results[kind, tuple(setting)] = evaluated(setting, folder, rank, split)
    return results


def in_other_ways(names: list[str]) -> dict[Any, Any]:
    """On each rank."""
    return {
        (name, tuple(setting), kind): mode(name, setting, dist.get_rank(), SPLITS[2][kind])
        for name, setting, kind in MODES
        if name in names
    }


@pytest.fixture(scope="module", params=SPLITS, ids=lambda world: f"{world} processes")
def found(request, tmp_path_factory):
    """The number of processes, and what every rank of them came to."""
    world = request.param
    make = lambda folder: run_ranks(taken, folder, processes=world).results  # noqa: E731
    return world, shared(tmp_path_factory, f"world-{world}", make)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the validation of a setting comes to without any distribution."""
    return shared(
        tmp_path_factory, "plain", lambda folder: {setting: evaluated(setting, folder) for setting in SETTINGS}
    )


def test_losses_and_gradients(found):
    world, ranks = found
    for kind in SPLITS[world]:
        for setting, (dtype, near) in itertools.product(settings(world, kind), TOLERANCE.items()):
            value, weights = step(net(dtype), setting.make(), *case(setting.ignored, dtype))
            for result in ranks:
                about = f"{kind}, {setting}, {dtype}"
                assert result[kind, setting, dtype][0] == pytest.approx(value, rel=near), about
                torch.testing.assert_close(
                    result[kind, setting, dtype][1], weights, rtol=near, atol=near, msg=lambda text, a=about: a + text
                )


def test_scores_and_tables_of_cases(found, plain):
    world, ranks = found
    for kind in SPLITS[world]:
        for setting in settings(world, kind):
            expected = plain[setting]
            assert ranks[0][kind, setting]["table"] == expected["table"], (kind, setting)
            assert len(expected["table"]) == IMAGES
            assert "val/dice" in expected["logged"]
            for result in ranks:
                # The checkpoint and early stopping decide by these, on every rank alike.
                assert result[kind, setting]["logged"] == pytest.approx(expected["logged"], rel=1e-10), (kind, setting)


def test_the_table_holds_every_setting(found):
    world, ranks = found
    assert len(ranks) == world
    counted = sum(len(settings(world, kind)) for kind in SPLITS[world])
    assert [len(rank) for rank in ranks] == [3 * counted] * world


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """What both ranks came to, by steps of other kinds; compiling takes most of the time."""

    def of(name: str) -> list[dict[Any, Any]]:
        names = [*COMPILED] if name in COMPILED else sorted({name for name, *_ in MODES} - {*COMPILED})
        run = lambda _: run_ranks(in_other_ways, names).results  # noqa: E731
        return shared(tmp_path_factory, "compiled" if name in COMPILED else "ways", run)

    return of


@pytest.mark.parametrize(
    ("name", "setting", "kind"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] if each[0] in COMPILED else [], id=f"{each[0]}-{each[1].loss}")
        for each in MODES
    ],
)
def test_in_another_way(ways, name, setting, kind):
    image, mask = case(setting.ignored)
    loss, model = setting.make(), net()
    results = [result[name, setting, kind] for result in ways(name)]
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
    *SMALL,
    *("loss=dice_ce", "optimizer=sgd", "optimizer.lr=0.1", "scheduler=constant", "logger=csv"),
    *("data.cases={train:16,val:2,test:5}", "trainer.max_epochs=2", "trainer.precision=64-true"),
    # No callback that happens to read metrics on every rank.
    "callbacks=[history,checkpoint,case_table]",
]


def trainings(home: Path) -> tuple[Path, dict[int, str]]:
    """A training of each number of processes, by the command, and what it printed."""
    processes = {}
    for world in SPLITS:
        line = [*GLOBAL_BATCH, f"data.batch_size={12 // world}", f"trainer.devices={world}", f"folder={world}"]
        strategy = [] if world == 1 else ["trainer.strategy=ddp"]
        processes[world] = [
            Forked("fit", *line, *strategy, cwd=home, environment={} if world == 1 else environment)
            for environment in rank_environments(world)
        ]
    told = {world: [process.wait().out for process in group] for world, group in processes.items()}
    return home, {world: first for world, (first, *_) in told.items()}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return shared(tmp_path_factory, "fitted", trainings)


def last_column(text: str) -> float:
    """The loss of the test split, of a printed table."""
    return float([line.split()[-1] for line in text.splitlines() if "loss  " in line][-1])


@pytest.mark.parametrize("world", [2, 3])
class TestFit:
    def test_same_losses_and_scores_in_every_epoch(self, fitted, world):
        # Lightning's file has all digits.
        home, _ = fitted
        several, one = (self.logged(home / f"{folder}/logs/csv/version_0/metrics.csv") for folder in (world, 1))
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
        home, _ = fitted
        table = rows(home / f"{world}/cases.csv")
        assert table == rows(home / "1/cases.csv")
        assert len(table) == 5

    def test_one_process_scores_it_alike(self, fitted, world, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_dice.plotting.report_plots.figure_url", lambda figure: "data:,")
        home, told = fitted
        again = run_command("evaluate", f"run={home / str(world)}", "output=again", "device=cpu", cwd=tmp_path).out
        assert rows(tmp_path / "again/cases.csv") == rows(home / f"{world}/cases.csv")
        assert last_column(told[world]) == pytest.approx(last_column(again), abs=1.1e-4)

    @pytest.mark.parametrize("name", ["best", "last"])
    def test_same_weights(self, fitted, world, name):
        mine, other = (
            torch.load(fitted[0] / folder / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]
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


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """On each rank."""
    return trained_and_predicted(folder, devices=2, strategy="ddp").state_dict()


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_more_batches_on_one_rank_and_each_case_predicted_once(tmp_path, strategy):
    if strategy == "ddp":
        weights = run_ranks(trained_weights, tmp_path).results[0]
    else:
        # As "ddp_spawn", which sends the module to its processes and back, but forked: starting costs most of it.
        forkserver()
        trained = trained_and_predicted(tmp_path, devices=2, strategy=DDPStrategy(start_method="forkserver"))
        weights = trained.state_dict()
    first, second = (torch.load(tmp_path / f"scores-{rank}.pt", weights_only=True) for rank in range(2))
    assert "val/dice" in first
    assert first == second
    predictions = [torch.load(tmp_path / f"predictions-{rank}.pt", weights_only=True) for rank in range(2)]
    names = [name for one in predictions for name in one]
    assert names == [f"test-000{index}" for index in range(5)]
    # What the weights say of each case, without a Trainer.
    module = SegmentationModule(nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)), DiceLoss())
    module.load_state_dict(weights)
    module.eval()
    cases = SyntheticSource(size=(32, 32), cases=(8, 3, 5)).split("test")
    for index in range(5):
        image, _, name, *_ = cases[index]
        expected = module.predict_step(image.unsqueeze(0))[0]
        assert torch.equal({**predictions[0], **predictions[1]}[name], expected)


def trained_with_an_idle_rank() -> str:
    module = SegmentationModule(nn.Conv2d(1, 1, 1))
    module.allow_zero_length_dataloader_with_multiple_devices = True
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp",
        "use_distributed_sampler": False,
    }
    trainer = L.Trainer(**settings, **dict.fromkeys(quiet, False), num_sanity_val_steps=0)
    data = [(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4))] * 2
    try:
        trainer.fit(module, DataLoader(data), DataLoader(data[: 1 - dist.get_rank()]))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_a_process_without_a_batch_to_validate_is_refused_by_all():
    """The others would wait for it forever."""
    for message in run_ranks(trained_with_an_idle_rank).results:
        assert message.startswith("1 of 2 processes have no batch to validate: give each at least one")

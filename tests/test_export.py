"""A model that is shipped says the same as the one that was trained, wherever it runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_command
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from lightning_dice import SegmentationModule
from lightning_dice import export as command
from lightning_dice.cli import run_folder
from lightning_dice.cli.config import CONF_DIR, register_resolvers
from lightning_dice.cli.errors import UserError
from lightning_dice.data import Standardize
from lightning_dice.data.images.image_reader import read_image, to_tensor
from lightning_dice.exporting import (
    FORMATS,
    SCHEMA,
    SCRIPT,
    ExportSettings,
    ExportWrapper,
    MissingExtra,
    NotExportable,
    OpenedFile,
    VerificationCase,
    capture_graph,
    model_card,
    verify,
)
from lightning_dice.exporting.formats import Onnx, Program, Weights
from lightning_dice.exporting.run_onnx import takes_pictures
from lightning_dice.inference import CALIBRATION, Inference, PostProcessing, Predictor
from lightning_dice.io import write_csv
from lightning_dice.loading import check_targets
from lightning_dice.scoring import Scoring

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SOFTMAX = ["data.activation=softmax", "data.classes=[background,cell,border]", "data.exclude_classes=[0]"]


def composed(name: str, *overrides: str):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def make_run(folder: Path, *overrides: str) -> Path:
    """The folder that fit would leave, of a convolution with random weights."""
    folder.mkdir(parents=True)
    config = composed("fit", "model=custom", f"folder={folder}", "device=cpu", *overrides)
    run_folder.resolve_data(config)
    run_folder.save_config(folder, config)
    torch.manual_seed(0)
    module = run_folder.build_module(config)
    plain = OmegaConf.to_container(config, resolve=True)
    saved = {"state_dict": module.state_dict(), "config": plain, "epoch": 4, "global_step": 20}
    (folder / "checkpoints").mkdir()
    torch.save(saved, folder / "checkpoints" / "best.ckpt")
    return folder


def export(run: Path, *settings: str, overrides: tuple[str, ...] = ()):
    return command.export(composed("export", f'run="{run}"', *settings), list(overrides))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("shipped from")


@pytest.fixture(scope="module")
def data(home):
    """Pictures of several kinds, and masks of 0 and 255."""
    rng = np.random.default_rng(0)
    pictures = {
        "gray": Image.fromarray(rng.integers(0, 256, (33, 50), dtype=np.uint8)),
        "rgb": Image.fromarray(rng.integers(0, 256, (32, 45, 3), dtype=np.uint8)),
        "deep": Image.fromarray(rng.integers(0, 65536, (20, 64), dtype=np.uint16)),
        "palette": Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).quantize(16),
        "opacity": Image.fromarray(rng.integers(0, 256, (31, 40, 4), dtype=np.uint8)),
    }
    for split in ("train", "val", "test"):
        for kind in ("images", "masks"):
            (home / "data" / kind / split).mkdir(parents=True)
        for name, picture in pictures.items():
            picture.save(home / "data" / "images" / split / f"{name}.png")
            mask = (rng.random((picture.height, picture.width)) < 0.4).astype(np.uint8) * 255
            Image.fromarray(mask).save(home / "data" / "masks" / split / f"{name}.png")
    return home / "data"


@pytest.fixture(scope="module")
def run(home, data):
    """A run on those pictures, with the tables that fit leaves."""
    folder = make_run(
        home / "cells",
        *("data=folder", f'data.root="{data}"', "data.classes=[cell]", "data.label_map={255:1}", "data.num_workers=0"),
        *("inference.mirror_axes=[0]", "normalize=fixed"),
    )
    scores = {"a": "0.5", "b": "0.75", "c": ""}
    rows = [{"split": "test", "case": case, "dice": dice, "dice/cell": dice} for case, dice in scores.items()]
    write_csv(folder / "cases.csv", ["split", "case", "dice", "dice/cell"], rows)
    write_csv(folder / "metrics.csv", ["epoch"], [{"epoch": str(epoch)} for epoch in range(6)])
    return folder


@pytest.fixture(scope="module")
def shipped(home, run):
    """Exported as a user does."""
    result = run_command("export", f"run={run}", "output=shipped model", "license=CC-BY-4.0", cwd=home)
    return home / "shipped model", result.out


def without_package(code: str, *arguments: str | Path, torch_too: bool = True) -> str:
    """What Python prints that cannot import this package, nor torch."""
    blocked = ["lightning_dice", "lightning", "monai", *(["torch"] if torch_too else [])]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n{code}"
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_script(script: Path, pictures: list[Path], folder: Path) -> None:
    """Run a script for each picture, in one process that has neither this package nor torch."""
    folder.mkdir()
    code = """
import runpy
script, folder, *pictures = sys.argv[1:]
for picture in pictures:
    sys.argv = [script, picture, folder + "/" + picture.rpartition("/")[2]]
    runpy.run_path(script, run_name="__main__")
"""
    without_package(code, script, folder, *pictures)


class TestOnnx:
    @pytest.mark.process
    def test_its_script_makes_the_masks_of_predict(self, home, data, run, shipped):
        images = data / "images" / "test"
        line = [f"run={run}", f"input={images}", "output=predicted", "inference.mirror_axes=[]", "device=cpu"]
        run_command("predict", *line, cwd=home)
        run_script(shipped[0] / "run_onnx.py", sorted(images.iterdir()), home / "scripted")
        for picture in images.iterdir():
            one, other = (Image.open(home / made / picture.name) for made in ("predicted", "scripted"))
            assert one.mode == other.mode
            assert np.array_equal(np.asarray(one), np.asarray(other)), picture.name
            assert set(np.unique(one)) == {0, 255}

    def test_says_what_it_found(self, shipped):
        assert "compared on 5 of 5 cases of the test split" in shipped[1]
        assert "100.000000% of 6,634 labels equal, 0 differ" in shipped[1]

    def test_the_facts_lie_in_the_file_and_beside_it(self, shipped):
        folder, _ = shipped
        facts = json.loads((folder / "model.json").read_text())
        assert Onnx().read_metadata(folder / "model.onnx") == facts
        assert (facts["name"], facts["license"], facts["output_type"]) == ("cells", "CC-BY-4.0", "logits")
        assert facts["input"]["dynamic"] == ["batch", "height", "width"]
        assert facts["classes"] == [{"name": "cell", "channel": 0, "value": 255, "scored": True}]
        assert facts["mirror_axes"] == [0]
        assert facts["normalization"]["inside"] is True
        assert facts["normalization"]["transform"]["_target_"] == "torchvision.transforms.v2.Normalize"
        assert facts["scores"] == {
            "split": "test",
            "cases": 3,
            "dice": 0.625,
            "classes": {"cell": {"dice": 0.625, "cases": 2}},
        }
        assert facts["verification"]["dice"] == facts["verification"]["exported_dice"] > 0
        assert (facts["training"]["epochs"], facts["training"]["epoch"]) == (6, 4)

    def test_axes_have_names(self, shipped):
        import onnx

        model = onnx.load(shipped[0] / "model.onnx")
        for value, channels in ((model.graph.input[0], 3), (model.graph.output[0], 1)):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert dims == ["batch", channels, "height", "width"]
        assert not any(node.metadata_props for node in model.graph.node)

    def test_nothing_of_this_machine_is_in_it(self, shipped):
        assert str(CONF_DIR.parent).encode() not in (shipped[0] / "model.onnx").read_bytes()

    def test_its_card(self, shipped):
        card = (shipped[0] / "MODEL_CARD.md").read_text()
        for text in (
            *(
                "# cells\n",
                "Licence: CC-BY-4.0",
                "train 5, val 5, test 5",
                "| cell | 0.6250 | 2 |",
                "| cell | 0 | 255 |",
            ),
            *("on 3 cases of its test split", "epochs: 6; weights of epoch 4", "DiceLoss(activation=sigmoid"),
            *(
                "run on 5 of 5 cases of the test split",
                "(0 differ)",
                "Not done",
                "not measured",
                "mirrored along the space axes",
            ),
        ):
            assert text in card, text
        assert "None." not in card

    def test_a_mean_is_right_where_the_runtime_adds_up_singly(self):
        """ONNX Runtime's own mean of a bright image is off in the fourth digit."""
        torch.manual_seed(0)
        image = (0.9 + 0.02 * torch.randn(2, 1, 700, 800)).clamp(0, 1)
        image[1] = 0.3  # A constant image has no standard deviation, and becomes zeros.
        module = SegmentationModule(nn.Identity())
        exact = torch.stack([Standardize()(one.double()) for one in image])
        run, _ = opened(Onnx(), ExportWrapper(module, Standardize(), float64_normalization=True), 2)
        found = run(image)
        assert (found - exact).abs().max() < 1e-5
        assert not found[1].any()


class Coarse(nn.Module):
    """Needs multiples of 4, mixes neighbours, and returns logits of half the size in a list, finest first."""

    def __init__(self, ndim: int, classes: int) -> None:
        super().__init__()
        convolution, transposed = ((nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[ndim - 2]
        self.down = convolution(1, 4, 3, stride=4, padding=1)
        self.up = transposed(4, 4, 2, stride=2)
        self.head = convolution(4, classes, 1)

    def forward(self, image):
        coarse = self.down(image)
        if any(4 * a != b for a, b in zip(coarse.shape[2:], image.shape[2:], strict=True)):
            raise ValueError("the size must be a multiple of 4")
        return {"out": [self.head(self.up(coarse.relu())), self.head(coarse)]}


def opened(format, deployed: ExportWrapper, ndim: int, size=None):
    """A function of images of one channel, from a file, and the least size that it takes."""
    captured = capture_graph(deployed, 1, ndim, size, portable=isinstance(format, Onnx))
    prepared = format.prepare(captured, SegmentationModule(deployed.net), deployed.output_type)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{format.suffix}"
        format.write(prepared, path, {"versions": {"lightning-dice": "0"}, "name": "a"})
        assert format.read_metadata(path)["name"] == "a"
        return format.open(path), captured.input_shape.minimum


class TestGraphs:
    @pytest.mark.parametrize("ndim", [2, pytest.param(3, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("format", [Onnx(), Program()], ids=lambda format: type(format).__name__)
    def test_images_of_any_number_and_size(self, format, ndim):
        torch.manual_seed(0)
        module = SegmentationModule(Coarse(ndim, 2), size_divisor=4, channels_last=True).eval()
        run, least = opened(format, ExportWrapper(module), ndim)
        # torch may ask a program for more than one of the network's coarsest cells.
        assert least in ((1, 5) if isinstance(format, Program) else (1,))
        for batch, *space in ((1, 8, 8, 8), (3, 9, 14, 5), (2, *[least] * 3), (1, 16, 8, 12)):
            image = torch.randn(batch, 1, *space[:ndim])
            with torch.no_grad():
                assert torch.allclose(run(image), module(image), atol=1e-5), (batch, space)

    @pytest.mark.parametrize(
        ("activation", "graph"), [("sigmoid", "labels"), ("sigmoid", "probabilities"), ("softmax", "labels")]
    )
    def test_what_a_graph_decides(self, activation, graph):
        torch.manual_seed(0)
        decision = PostProcessing(temperature=2.0, thresholds=[0.2, 0.5, 0.4], min_size=50)
        module = SegmentationModule(
            nn.Conv2d(1, 3, 3, padding=1), activation=activation, inference=Inference(postprocessing=decision)
        )
        image = 3 * torch.randn(2, 1, 17, 13)
        with torch.no_grad():
            logits = module(image)
        probs = (logits / 2).softmax(1) if activation == "softmax" else 1 / (1 + (-logits / 2).exp())
        scaled = probs / torch.tensor([0.2, 0.5, 0.4]).view(1, 3, 1, 1)
        # Components are not removed: that is the business of whoever runs the file.
        labels = scaled.argmax(1) if activation == "softmax" else scaled > 1
        run, _ = opened(Onnx(), ExportWrapper(module, output_type=graph), 2)
        found = run(image)
        if graph == "labels":
            assert found.dtype == torch.uint8
            assert torch.equal(found.long(), labels.long())
        else:
            assert torch.allclose(found, probs, atol=1e-6)

    @pytest.mark.process
    def test_a_program_runs_without_the_package(self, tmp_path):
        torch.manual_seed(0)
        module = SegmentationModule(Coarse(2, 1), size_divisor=4).eval()
        captured = capture_graph(ExportWrapper(module, Standardize()), 1, 2)
        image = torch.rand(3, 1, 9, 14)
        with torch.no_grad():
            expected = module(torch.stack([Standardize()(one) for one in image]))
        Program().write(captured.program, tmp_path / "model.pt2", {"name": "a"})
        np.save(tmp_path / "image.npy", image.numpy())
        code = """
import json, numpy, torch
facts = {"model.json": ""}
model = torch.export.load(sys.argv[1] + "/model.pt2", extra_files=facts).module()
numpy.save(sys.argv[1] + "/logits.npy", model(torch.from_numpy(numpy.load(sys.argv[1] + "/image.npy"))).numpy())
print(json.loads(facts["model.json"])["name"])
"""
        assert without_package(code, tmp_path, torch_too=False) == "a\n"
        assert np.allclose(np.load(tmp_path / "logits.npy"), expected.numpy(), atol=1e-6)
        with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
            assert not [name for name in archive.namelist() if str(CONF_DIR.parent).encode() in archive.read(name)]

    def test_a_network_of_one_size(self):
        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.values = nn.Parameter(torch.randn(1, 1, 8, 12))

            def forward(self, image):
                return image + self.values

        deployed = ExportWrapper(SegmentationModule(Positions()))
        with pytest.raises(NotExportable, match="size"):
            capture_graph(deployed, 1, 2)
        run, _ = opened(Onnx(), deployed, 2, [8, 12])
        image = torch.randn(2, 1, 8, 12)
        assert torch.equal(run(image), image + deployed.net.values)

    @pytest.mark.parametrize("portable", [True, False])
    def test_a_graph_that_holds_for_some_sizes_only(self, portable):
        """As in SwinUNETR, whose windows torch counts once and for all: in ONNX nothing would tell."""

        class Counted(nn.Module):
            def forward(self, image):
                for _ in range(image.shape[-1] // 7):
                    image = image + 1
                return image

        with pytest.raises(NotExportable):
            capture_graph(ExportWrapper(SegmentationModule(Counted(), size_divisor=2)), 1, 2, portable=portable)

    def test_a_network_that_asks_for_values(self):
        class Asking(nn.Module):
            def forward(self, image):
                return image if image.sum() > 0 else -image

        with pytest.raises(NotExportable, match=r"^\w+: .*data-dependent") as told:
            capture_graph(ExportWrapper(SegmentationModule(Asking())), 1, 2)
        assert "\n" not in str(told.value)
        message = ExportSettings().explain(told.value, Asking())
        for text in ("Asking cannot be exported as onnx", "size=[...]", "format=torch_export", "format=safetensors"):
            assert text in message


@pytest.fixture(scope="module")
def weights(tmp_path_factory, run):
    """Exported with a calibration."""
    folder = tmp_path_factory.mktemp("weights")
    PostProcessing(temperature=1.5, thresholds=[0.3]).save(folder / CALIBRATION)
    export(run, "format=safetensors", f'output="{folder}"', f'calibration="{folder / CALIBRATION}"', "split=val")
    return folder / "model.safetensors"


class TestSafetensors:
    def test_the_module_is_as_it_was(self, run, weights):
        one, other = SegmentationModule.from_safetensors(weights), SegmentationModule.from_run(run)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
        assert (one.inference.postprocessing.temperature, one.inference.postprocessing.thresholds) == (1.5, (0.3,))
        assert one.inference.mirroring.axes == (0,)
        images = torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8)
        other.calibrate(one.inference.postprocessing)
        assert torch.equal(one.segment(images), other.segment(images))
        assert not torch.equal(one.segment(images), one.predict_step(images / 255))
        assert not one.training
        assert json.loads(weights.with_suffix(".json").read_text()) == Weights().read_metadata(weights)
        assert "before the calibration" in (weights.parent / "MODEL_CARD.md").read_text()

    def test_calls_nothing_but_what_is_trusted(self, weights, tmp_path):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(weights, framework="pt") as file:
            header = file.metadata()
        facts = json.loads(header["lightning_dice"])
        facts["module"]["net"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'harm'}"}
        save_file(load_file(weights), tmp_path / "a.safetensors", {"lightning_dice": json.dumps(facts)})
        with pytest.raises(ValueError, match=r"the config calls os\.system, which is not in"):
            SegmentationModule.from_safetensors(tmp_path / "a.safetensors")
        # What a trusted module has imported is not in it either.
        facts["module"]["net"]["_target_"] = "torch.nn.modules.module.warnings.sys.exit"
        save_file(load_file(weights), tmp_path / "b.safetensors", {"lightning_dice": json.dumps(facts)})
        with pytest.raises(ValueError, match="which is not in"):
            SegmentationModule.from_safetensors(tmp_path / "b.safetensors")
        assert not (tmp_path / "harm").exists()
        check_targets(facts["module"]["loss"], ["lightning_dice"])

    def test_other_files(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
        with pytest.raises(ValueError, match=r"was not written by lightning_dice\.export"):
            SegmentationModule.from_safetensors(tmp_path / "plain.safetensors")
        (tmp_path / "torn.safetensors").write_bytes(b"abc")
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            SegmentationModule.from_safetensors(tmp_path / "torn.safetensors")
        with pytest.raises(FileNotFoundError):
            SegmentationModule.from_safetensors(tmp_path / "none.safetensors")


@pytest.mark.process
@pytest.mark.parametrize(
    ("activation", "graph"),
    [("softmax", "logits"), ("softmax", "probabilities"), ("sigmoid", "logits"), ("sigmoid", "labels")],
)
def test_scripts_decide_as_the_module(tmp_path, activation, graph):
    """For every graph and activation, with thresholds, a temperature and values of the masks' own."""
    jsonschema = pytest.importorskip("jsonschema")
    overrides = [*SOFTMAX, "normalize=fixed", "data.channels=1"] if activation == "softmax" else ["data.classes=[a,b]"]
    folder = make_run(
        tmp_path / "run", "data=folder", f'data.root="{tmp_path}"', "data.label_map={90:1,40:2}", *overrides
    )
    thresholds = [0.5, 0.2, 0.4] if activation == "softmax" else [0.3, 0.6]
    PostProcessing(temperature=0.7, thresholds=thresholds).save(folder / CALIBRATION)
    export(folder, f"output_type={graph}", f'output="{tmp_path / "out"}"', "normalization=outside")
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    jsonschema.validate(facts, json.loads(SCHEMA.read_text()))
    assert facts["verification"]["data"].endswith("as the data were not available")

    image = np.random.default_rng(0).integers(0, 256, (21, 30), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "picture.png")
    run_script(tmp_path / "out" / "run_onnx.py", [tmp_path / "picture.png"], tmp_path / "masks")
    module = trained(folder)
    pixels = to_tensor(read_image(tmp_path / "picture.png"), 1 if activation == "softmax" else 3)
    pixels = (pixels - 0.5) / 0.25 if activation == "softmax" else Standardize()(pixels)
    labels = module.predict_step(pixels[None])[0]
    if activation == "softmax":
        expected = {"picture": np.array([0, 90, 40])[labels.numpy()]}
    else:
        expected = {f"picture_{name}": np.where(plane, 90, 0) for name, plane in zip("ab", labels.numpy(), strict=True)}
    assert {path.stem for path in (tmp_path / "masks").iterdir()} == set(expected)
    for name, mask in expected.items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / f"{name}.png")), mask)
        assert len(np.unique(mask)) > 1


def trained(folder: Path) -> SegmentationModule:
    module = run_folder.build_module(run_folder.reopen(folder))
    module.load_state_dict(torch.load(folder / "checkpoints" / "best.ckpt")["state_dict"])
    module.calibrate(PostProcessing.load(folder / CALIBRATION))
    return module.eval()


class TestCommand:
    def test_by_windows(self, run, tmp_path):
        settings = ["format=torch_export", f'output="{tmp_path / "a.pt2"}"', "cases=2"]
        assert export(run, *settings, overrides=("inference.size=[16,16]",)) is None
        facts = json.loads((tmp_path / "a.json").read_text())
        # Of a window the statistics are not those of its image.
        assert (facts["normalization"]["inside"], facts["window"]["size"]) == (False, [16, 16])
        assert facts["verification"]["different_pixels"] == 0
        assert facts["scores"] is None
        assert "Not measured for these weights and settings" in (tmp_path / "MODEL_CARD.md").read_text()
        assert not takes_pictures(facts)
        assert not (tmp_path / "run_onnx.py").exists()

    @pytest.mark.process
    def test_a_script_takes_arrays_where_the_model_does_not_take_whole_pictures(self, run, tmp_path):
        import onnxruntime

        settings = [f'output="{tmp_path / "tiles.onnx"}"', "cases=1"]
        assert export(run, *settings, overrides=("inference.size=[16,16]",)) is None
        script = tmp_path / "run_onnx.py"
        assert script.read_bytes() == SCRIPT.read_bytes()
        image = np.random.default_rng(0).random((2, 3, 16, 16))
        np.save(tmp_path / "image.npy", image)
        code = "import runpy\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        shown = json.loads(without_package(code, script, tmp_path / "image.npy", tmp_path / "output.npy"))
        assert list(shown) == ["input", "normalization", "output", "window"]
        assert shown["window"]["size"] == [16, 16]
        net = onnxruntime.InferenceSession(tmp_path / "tiles.onnx", providers=["CPUExecutionProvider"])
        (expected,) = net.run(None, {"image": image.astype(np.float32)})
        assert np.array_equal(np.load(tmp_path / "output.npy"), expected)
        # A second model beside it must be chosen.
        for suffix in (".onnx", ".json"):
            (tmp_path / f"other{suffix}").write_bytes((tmp_path / f"tiles{suffix}").read_bytes())
        line = [sys.executable, script, tmp_path / "image.npy", tmp_path / "again.npy"]
        result = subprocess.run(line, capture_output=True, text=True, check=False)
        assert "there must be one model beside" in result.stderr
        assert "other.json, tiles.json" in result.stderr
        subprocess.run([*line, tmp_path / "tiles.json"], capture_output=True, check=True)
        assert np.array_equal(np.load(tmp_path / "again.npy"), expected)
        (tmp_path / "other.json").unlink()
        usage = subprocess.run(line[:2], capture_output=True, text=True, check=False)
        assert usage.stderr == "usage: python run_onnx.py image.npy output.npy\n"

    def test_writes_nothing_that_says_otherwise(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(Program, "open", lambda self, path: lambda image: image[:, :1] - image[:, 1:2])
        settings = ["format=torch_export", "normalization=outside"]
        told = export(run, f'output="{tmp_path / "new" / "folder"}"', *settings)
        assert "of the labels differ from PyTorch's, and tolerance=0.0001 allows 0.010%" in told
        assert not (tmp_path / "new").exists()
        assert export(run, f'output="{tmp_path / "new"}"', *settings, "tolerance=1") is None

    def test_never_overwrites(self, run, tmp_path):
        (tmp_path / "MODEL_CARD.md").write_text("mine")
        with pytest.raises(UserError, match=r"MODEL_CARD.md exists, and nothing is overwritten"):
            export(run, f'output="{tmp_path}"')
        assert [path.name for path in tmp_path.iterdir()] == ["MODEL_CARD.md"]
        export(run, f'output="{tmp_path}"', "overwrite=true", "format=safetensors")
        assert (tmp_path / "MODEL_CARD.md").read_text() != "mine"

    def test_a_package_that_is_missing(self, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        message = r"format=onnx needs onnxscript, which is not installed: pip install 'lightning-dice\[export\]'"
        with pytest.raises(MissingExtra, match=message):
            FORMATS["onnx"]().require()
        with pytest.raises(UserError, match=message):
            export(run)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["format=onxx"], "format must be one of onnx, torch_export, safetensors, got onxx"),
            (["cases=-1"], "cases must be an integer of at least 0, got -1"),
            (["tolerance=2"], r"tolerance must be a fraction of the labels in \[0, 1\], got 2"),
            (["format=torch_export", "opset=18"], "opset is a setting of ONNX"),
            (["format=safetensors", "output_type=labels"], "leave output_type=labels out"),
            (["output_type=labels", "size=[8,8]"], "output_type=labels needs size=null"),
            (["size=[8]"], "size must be a number of pixels for each of 2 space axes"),
            (["normalization=inside", "size=[8,8]"], "the model is run in windows"),
            (["format=torch_export", "output=a.onnx"], "output a.onnx must end in .pt2"),
            (["checkpoint=last"], "the run has no last.ckpt"),
            (["calibration=nowhere.json"], "there is no calibration file nowhere.json"),
            (["split=train", 'output="/proc/no/such"'], "cannot make the output folder"),
        ],
    )
    def test_refuses(self, run, settings, message):
        before = sorted(run.iterdir())
        with pytest.raises(UserError, match=message):
            export(run, *settings)
        assert sorted(run.iterdir()) == before


class TestCompare:
    def test_counts_what_differs(self):
        """Of 12 labels 3 differ; the truth has 4 pixels, of which the module finds all and the file 2, and 1 more."""
        logits = torch.tensor([[[5.0, 5, -5, -5], [5, 5, -5, -5], [-5, -5, -5, -5]]])
        wrong = logits.clone()
        wrong[0, 0, :2], wrong[0, 2, 3] = -1, 2
        predictor = Predictor([lambda image: image], activation="sigmoid")
        found = verify(
            OpenedFile(lambda image: wrong[None], "logits"),
            predictor,
            [VerificationCase("a", logits, (logits > 0).long())],
            data="a case",
            scoring=Scoring(["a"], "sigmoid", surfaces=False, lesions=False),
        )
        assert (found.cases, found.pixels, found.different) == (1, 12, 3)
        assert found.largest_difference == 7
        assert (found.dice, found.exported_dice) == (1.0, pytest.approx(4 / 7))
        assert found.different_fraction == 0.25

    def test_masks_of_another_size(self):
        image = torch.tensor([[[4.0, 4, -4, -4]] * 2])
        mask = (torch.arange(8) < 4).long().expand(1, 4, 8)
        scoring = Scoring(["a"], "sigmoid", surfaces=False, lesions=False)
        predictor = Predictor([lambda batch: batch], activation="sigmoid")
        for graph, run in (("logits", lambda x: x), ("labels", lambda x: (x > 0).to(torch.uint8))):
            case = VerificationCase("a", image, mask)
            found = verify(OpenedFile(run, graph), predictor, [case], data="", scoring=scoring)
            assert (found.dice, found.exported_dice, found.different) == (1.0, 1.0, 0)

    def test_what_is_not_finite(self):
        predictor = Predictor([lambda batch: batch], activation="sigmoid")
        with pytest.raises(ValueError, match="the file's logits of a are not finite"):
            verify(
                OpenedFile(lambda image: image * math.nan, "logits"),
                predictor,
                [VerificationCase("a", torch.zeros(1, 2, 2))],
                data="",
                scoring=Scoring(["a"], "sigmoid"),
            )


def test_a_card_says_what_it_does_not_know(shipped):
    facts = json.loads((shipped[0] / "model.json").read_text()) | {
        "scores": None,
        "license": None,
        "verification": None,
    }
    card = model_card(facts, files=[Path("model.onnx")])
    for text in (
        "Licence: not stated",
        "the data were not available",
        "Not measured for these weights",
        "Not measured.",
    ):
        assert text in card

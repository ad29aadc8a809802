"""What the sums cost in time and memory, against plain code and the peers: `python -m tests.benchmarks.sums`.

Every table comes from one process, its contenders interleaved round by round; a ratio is taken within a round. On the
CPU the allocator decides half of the time, so each case runs with the C library's defaults, and again with freed memory
kept. Peak memory is that of a process of its own: what stands resident beyond the inputs, so the gradient counts.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lightning_dice.functional as LF
from lightning_dice import kernels
from lightning_dice.losses import DiceCELoss, DiceLoss
from tests.benchmarks.timing import marks, shared_rounds

SMOOTH = 1e-5

SHAPES = {
    "binary": (8, 1, 512, 512),
    "19": (4, 19, 512, 512),
    "14": (2, 14, 96, 96, 96),
    "118": (1, 118, 96, 96, 96),
    "metrics-19": (4, 19, 512, 512),
    "metrics-118": (4, 118, 512, 512),
}
QUICK = {
    "binary": (2, 1, 32, 32),
    "19": (2, 5, 32, 32),
    "14": (2, 4, 8, 8, 16),
    "118": (1, 9, 8, 8, 16),
    "metrics-19": (2, 5, 32, 32),
    "metrics-118": (2, 9, 32, 32),
}
# Enough pixels that warming up on them starts all threads, few enough to leave no trace in the memory.
WARM_PIXELS = 2**17

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# glibc refuses an M_MMAP_THRESHOLD above 32 MiB without a word. With no mapping at all, blocks of any size come from
# its heap, which the other setting keeps from being given back: after a few calls hardly a page is fresh. The last is
# torch's own: aligned blocks that the kernel may back with pages of 2 MiB.
ALLOCATORS = {
    "default": {},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"},
    "huge": {"THP_MEM_ALLOC_ENABLE": "1"},
}
ALLOCATOR_TITLES = {"default": "default", "kept": "memory kept", "huge": "huge pages"}


@dataclass(frozen=True)
class Inputs:
    """What the contenders read.

    Attributes:
        logits: `(batch, classes, *space)`.
        ids: class ids of blocks of 8 pixels, int64 `(batch, *space)`.
        planes: float32, of the shape of binary logits.
        labels: a prediction that is right in nine pixels of ten, as ids.
    """

    logits: Tensor
    ids: Tensor
    planes: Tensor
    labels: Tensor

    def leaf(self) -> Inputs:
        """The same with logits that have no gradient yet."""
        return Inputs(self.logits.detach().requires_grad_(), self.ids, self.planes, self.labels)


Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        make: what returns the function to be measured; imports of peers happen here.
        context: what its calls run in.
        compiled: whether it compiles itself for one shape, so that only that shape warms it.
    """

    make: Callable[[], Run]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    compiled: bool = False


@dataclass(frozen=True)
class Group:
    """One table: contenders by name, the first of which is the base of the ratios.

    Attributes:
        unit: name of the tensor in whose multiples memory is given.
        needed: names of the tensors that any contender must read.
        backward: whether it has one.
    """

    title: str
    contenders: dict[str, Contender]
    unit: str = "logits"
    needed: tuple[str, ...] = ("logits", "ids")
    backward: bool = True


def build(shape: Sequence[int], dtype: torch.dtype, device: str) -> Inputs:
    """Random logits, and a target of smooth regions."""
    torch.manual_seed(0)
    batch, classes, *space = shape
    ids = torch.randint(max(2, classes), (batch, *(math.ceil(size / 8) for size in space)))
    for axis, size in enumerate(space, start=1):
        ids = ids.repeat_interleave(8, axis).narrow(axis, 0, size)
    wrong = torch.rand(ids.shape) < 0.1
    labels = torch.where(wrong, torch.randint_like(ids, max(2, classes)), ids)
    planes = ids.unsqueeze(1).float() if classes == 1 else torch.empty(0)
    # Drawing them all takes seconds. A prime number of them repeats itself at no class or row.
    drawn = torch.randn(1_000_003).to(dtype)
    logits = drawn.repeat(math.ceil(math.prod(shape) / len(drawn)))[: math.prod(shape)].clone().view(*shape)
    return Inputs(*(tensor.contiguous().to(device) for tensor in (logits, ids, planes, labels)))


def naive_dice(logits: Tensor, ids: Tensor) -> Tensor:
    """Dice as tutorials write it."""
    axes = (0, *range(2, logits.ndim))
    p, t = logits.softmax(1), F.one_hot(ids, logits.shape[1]).movedim(-1, 1)
    score = (2 * (p * t).sum(axes) + SMOOTH) / (p.sum(axes) + t.sum(axes) + SMOOTH)
    return 1 - score.mean()


def naive_dice_ce(logits: Tensor, ids: Tensor) -> Tensor:
    """The same with torch's cross-entropy."""
    return naive_dice(logits, ids) + F.cross_entropy(logits, ids)


def clean_dice(logits: Tensor, ids: Tensor) -> Tensor:
    """Dice as a compiler likes it: a comparison that it fuses in place of the one-hot tensor, sums in float32."""
    return _clean(logits.float().softmax(1), ids)


def clean_dice_ce(logits: Tensor, ids: Tensor) -> Tensor:
    """The same with the cross-entropy, from one log-softmax."""
    log_p = logits.float().log_softmax(1)
    return _clean(log_p.exp(), ids) - log_p.gather(1, ids.unsqueeze(1)).mean()


def _clean(p: Tensor, ids: Tensor) -> Tensor:
    axes = (0, *range(2, p.ndim))
    each = torch.arange(p.shape[1], device=p.device).view(-1, *[1] * (p.ndim - 2))
    t = ids.unsqueeze(1) == each
    score = (2 * p.where(t, 0).sum(axes) + SMOOTH) / (p.sum(axes) + t.sum(axes) + SMOOTH)
    return 1 - score.mean()


def naive_binary_dice(logits: Tensor, planes: Tensor) -> Tensor:
    """The four lines."""
    p = logits.sigmoid()
    return 1 - (2 * (p * planes).sum() + SMOOTH) / (p.sum() + planes.sum() + SMOOTH)


def naive_binary_dice_ce(logits: Tensor, planes: Tensor) -> Tensor:
    """The same with torch's cross-entropy."""
    return naive_binary_dice(logits, planes) + F.binary_cross_entropy_with_logits(logits, planes)


def pairs(labels: Tensor, ids: Tensor, classes: int) -> Tensor:
    """A confusion matrix of each image, by `bincount`."""
    images = [
        torch.bincount((t * classes + p).flatten(), minlength=classes**2) for p, t in zip(labels, ids, strict=True)
    ]
    return torch.stack(images).view(-1, classes, classes)


def on_ids(make: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[], Run]:
    """A loss of logits and ids."""
    return lambda: (lambda loss: lambda inputs: loss(inputs.logits, inputs.ids))(make())


def on_channel(make: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[], Run]:
    """A loss of logits and ids with an axis for one channel."""
    return lambda: (lambda loss: lambda inputs: loss(inputs.logits, inputs.ids.unsqueeze(1)))(make())


def on_planes(make: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[], Run]:
    """A loss of logits and planes."""
    return lambda: (lambda loss: lambda inputs: loss(inputs.logits, inputs.planes))(make())


def compiled(function: Callable[..., Tensor], quick: bool) -> Callable[..., Tensor]:
    """The function, compiled; only traced if it must be quick."""
    return torch.compile(function, dynamic=False, backend="eager" if quick else "inductor")


def peer(module: str, name: str, *arguments: Any, **settings: Any) -> Callable[[], Callable[..., Tensor]]:
    """What makes a peer's loss."""
    return lambda: getattr(importlib.import_module(module), name)(*arguments, **settings)


def nnunet(regions: bool, compiling: Callable[[Any], Any] | None = None) -> Callable[[], Callable[..., Tensor]]:
    """nnU-Net's loss as its trainer builds it, but for several processes; it compiles the Dice loss if it can."""

    def make() -> Callable[..., Tensor]:
        losses = importlib.import_module("nnunetv2.training.loss.compound_losses")
        dice = {"batch_dice": False, "smooth": SMOOTH, "do_bg": regions, "ddp": False}
        kind = {"dice_class": losses.MemoryEfficientSoftDiceLoss}
        loss = losses.DC_and_BCE_loss({}, dice, **kind) if regions else losses.DC_and_CE_loss(dice, {}, **kind)
        if compiling is not None:
            loss.dc = compiling(loss.dc)
        return loss  # type: ignore[no-any-return]

    return make


def backends(device: str, run: Callable[[], Run]) -> dict[str, Contender]:
    """Each implementation of our sums that is meant for the device."""
    names = ("reference", "blocked", "triton" if device == "cuda" else "native")
    return {f"ours: {name}": Contender(run, context=partial(kernels.forced, name, strict=True)) for name in names}


def groups(case: str, device: str, quick: bool) -> list[Group]:
    """The tables of a case."""
    if case.startswith("metrics"):
        return metrics(quick)
    clone = {"logits.clone()": Contender(lambda: lambda inputs: inputs.logits.detach().clone())}
    if case == "binary":
        return binary(device, quick, clone)
    facts: dict[str, Any] = {"activation": "softmax", "smooth": SMOOTH}
    monai = {"to_onehot_y": True, "softmax": True}
    dice = {
        "ours": Contender(on_ids(lambda: DiceLoss(**facts))),
        **clone,
        "naive": Contender(on_ids(lambda: naive_dice)),
        "naive, compiled": Contender(on_ids(lambda: compiled(clean_dice, quick)), compiled=True),
        "smp": Contender(on_ids(peer("segmentation_models_pytorch.losses", "DiceLoss", "multiclass"))),
        "MONAI": Contender(on_channel(peer("monai.losses", "DiceLoss", **monai))),
    }
    ours = on_ids(lambda: DiceCELoss(**facts))
    both = {
        "ours": Contender(ours),
        **clone,
        "F.cross_entropy alone": Contender(on_ids(lambda: F.cross_entropy)),
        "naive": Contender(on_ids(lambda: naive_dice_ce)),
        "naive, compiled": Contender(on_ids(lambda: compiled(clean_dice_ce, quick)), compiled=True),
        "MONAI": Contender(on_channel(peer("monai.losses", "DiceCELoss", **monai))),
        "nnU-Net": Contender(on_channel(nnunet(False))),
        "nnU-Net, its Dice compiled": Contender(
            on_channel(nnunet(False, lambda module: compiled(module, quick))), compiled=True
        ),
        **backends(device, ours),
    }
    return [Group("Dice", dice), Group("Dice + cross-entropy", both)]


def binary(device: str, quick: bool, clone: Mapping[str, Contender]) -> list[Group]:
    """The tables of one class."""
    needed = ("logits", "planes")
    ours_dice, ours = on_planes(lambda: DiceLoss(smooth=SMOOTH)), on_planes(lambda: DiceCELoss(smooth=SMOOTH))
    dice = {
        "ours": Contender(ours_dice),
        **clone,
        "naive": Contender(on_planes(lambda: naive_binary_dice)),
        "naive, compiled": Contender(on_planes(lambda: compiled(naive_binary_dice, quick)), compiled=True),
        "smp": Contender(on_planes(peer("segmentation_models_pytorch.losses", "DiceLoss", "binary"))),
        "MONAI": Contender(on_planes(peer("monai.losses", "DiceLoss", sigmoid=True))),
    }
    both = {
        "ours": Contender(ours),
        **clone,
        "F.binary_cross_entropy_with_logits alone": Contender(on_planes(lambda: F.binary_cross_entropy_with_logits)),
        "naive": Contender(on_planes(lambda: naive_binary_dice_ce)),
        "naive, compiled": Contender(on_planes(lambda: compiled(naive_binary_dice_ce, quick)), compiled=True),
        "MONAI": Contender(on_planes(peer("monai.losses", "DiceCELoss", sigmoid=True))),
        "nnU-Net": Contender(on_planes(nnunet(True))),
        **backends(device, ours),
    }
    return [Group("Dice", dice, needed=needed), Group("Dice + cross-entropy", both, needed=needed)]


def metrics(quick: bool) -> list[Group]:
    """Counts of hard predictions."""

    def argmax(logits: Tensor) -> Tensor:
        return logits.argmax(1)

    def compiled_argmax() -> Run:
        function = compiled(argmax, quick)
        return lambda inputs: function(inputs.logits)

    def torchmetrics() -> Run:
        segmentation = importlib.import_module("torchmetrics.segmentation")

        def run(inputs: Inputs) -> Tensor:
            metric = segmentation.DiceScore(inputs.logits.shape[1], average="macro", input_format="index")
            metric.to(inputs.ids.device).update(inputs.labels, inputs.ids)
            return metric.numerator[0]  # type: ignore[no-any-return]

        return run

    def label_sums(inputs: Inputs) -> Tensor:
        return LF.label_sums(inputs.labels, inputs.ids, inputs.logits.shape[1]).overlap

    def hard_sums(inputs: Inputs) -> Tensor:
        return LF.hard_sums(inputs.logits, inputs.ids, activation="softmax").overlap

    from_logits = {
        "ours": Contender(lambda: hard_sums),
        "logits.clone()": Contender(lambda: lambda inputs: inputs.logits.clone()),
        "logits.argmax(1) alone": Contender(lambda: lambda inputs: inputs.logits.argmax(1)),
        "logits.argmax(1) alone, compiled": Contender(compiled_argmax, compiled=True),
        "logits.max(1) alone": Contender(lambda: lambda inputs: inputs.logits.max(1).indices),
    }
    from_labels = {
        "ours": Contender(lambda: label_sums),
        "bincount of pairs": Contender(lambda: lambda inputs: pairs(inputs.labels, inputs.ids, inputs.logits.shape[1])),
        "torchmetrics DiceScore": Contender(torchmetrics),
    }
    return [
        Group("Counts from logits", from_logits, backward=False),
        Group("Counts from labels", from_labels, unit="ids", needed=("labels", "ids"), backward=False),
    ]


def timed(contender: Contender, run: Run, inputs: Inputs, *, backward: bool) -> tuple[float, float]:
    """Seconds of forward and backward."""
    inputs = inputs.leaf() if backward else inputs
    mark, seconds = marks(inputs.logits.device.type)
    with contender.context():
        mark()
        result = run(inputs)
        mark()
        if result.requires_grad:
            torch.autograd.backward(result)
            mark()
    forward, *rest = seconds()
    return forward, sum(rest)


def fresh_pages() -> int:
    """Bytes of memory that the process touched for the first time so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()


def time_group(group: Group, inputs: Inputs, budget: float) -> dict[str, dict[str, Any]]:
    """Times of all contenders, or why one failed, by name; `budget` in seconds."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in group.contenders}
    measures: dict[str, Callable[[], tuple[float, float]]] = {}
    for name, contender in group.contenders.items():
        try:
            run = contender.make()

            def measure(contender: Contender = contender, run: Run = run) -> tuple[float, float]:
                return timed(contender, run, inputs, backward=group.backward)

            measure()  # Compiles what compiles.
            measures[name] = measure
        except Exception as error:
            rows[name]["failure"] = reason(error)
    unit = getattr(inputs, group.unit).nbytes
    touched: dict[str, list[float]] = {name: [] for name in measures}

    def counted(name: str) -> tuple[float, float]:
        before = fresh_pages()
        seconds = measures[name]()
        touched[name].append((fresh_pages() - before) / unit)
        return seconds

    rounds = shared_rounds({name: partial(counted, name) for name in measures}, budget)
    for name in measures:
        forward = [times[name][0] for times in rounds if name in times]
        backward = [times[name][1] for times in rounds if name in times]
        base = next(iter(rounds[0]))
        ratios = [sum(times[name]) / sum(times[base]) for times in rounds if name in times]
        rows[name] |= {"forward": forward, "backward": backward, "ratios": ratios, "base": base}
        rows[name]["fresh"] = statistics.median(touched[name][-len(forward) :])
    return rows


def reason(error: BaseException) -> str:
    """The first line of what went wrong, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}".replace("|", "/")
    return text if len(text) <= 90 else text[:87] + "..."


def status(field: str) -> int:
    """A field of the process's status, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory_cpu(
    contender: Contender, group: Group, shape: Sequence[int], dtype: torch.dtype
) -> tuple[float, float] | None:
    """Peak beyond the inputs, and what is held between forward and backward; to be called in a fresh process."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    run = contender.make()
    batch, classes, *space = shape
    shrink = max(1.0, batch * classes * math.prod(space) / WARM_PIXELS) ** (1 / len(space))
    small = (batch, classes, *(max(1, round(size / shrink)) for size in space))
    inputs = build(shape, dtype, "cpu")
    timed(contender, run, inputs if contender.compiled else build(small, dtype, "cpu"), backward=group.backward)
    inputs = inputs.leaf() if group.backward else inputs
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # The highest resident size counts from here.
    before = status("VmRSS")
    with contender.context():
        result = run(inputs)
        trim(0)
        held = status("VmRSS") - before
        if result.requires_grad:
            torch.autograd.backward(result)
    peak = status("VmHWM") - before
    unit = getattr(inputs, group.unit).nbytes
    return max(0, peak) / unit, max(0, held) / unit


def memory_cuda(contender: Contender, group: Group, inputs: Inputs) -> tuple[float, float]:
    """The same, of CUDA's allocator."""
    run = contender.make()
    timed(contender, run, inputs, backward=group.backward)
    inputs = inputs.leaf() if group.backward else inputs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with contender.context():
        result = run(inputs)
        held = torch.cuda.memory_allocated() - before
        if result.requires_grad:
            torch.autograd.backward(result)
    peak = torch.cuda.max_memory_allocated() - before
    unit = getattr(inputs, group.unit).nbytes
    return peak / unit, held / unit


def apart(function: Callable[[], Any]) -> Any:
    """What the function returns in a forked process.

    Raises:
        RuntimeError: it failed, or its process died.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child() -> None:
        try:
            theirs.send((function(), None))
        except Exception as error:
            theirs.send((None, reason(error)))

    process = context.Process(target=child)
    process.start()
    theirs.close()
    try:
        result, failure = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with {process.exitcode}") from None
    process.join()
    if failure is not None:
        raise RuntimeError(failure)
    return result


def work(case: str, dtype: str, spec: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Times of each group of a case, and peak memory if the spec wants it."""
    shape, device = spec["shapes"][case], spec["device"]

    def times() -> list[dict[str, dict[str, Any]]]:
        inputs = build(shape, DTYPES[dtype], device)
        return [time_group(group, inputs, spec["budget"]) for group in groups(case, device, spec["quick"])]

    tables: list[dict[str, dict[str, Any]]]
    # A process that has used the GPU cannot fork, and need not: its allocator keeps all, and counts.
    tables = apart(times) if device == "cpu" else times()
    if not spec["peak"]:
        return tables
    for group, rows in zip(groups(case, device, spec["quick"]), tables, strict=True):
        inputs = None if device == "cpu" else build(shape, DTYPES[dtype], device)
        for name, contender in group.contenders.items():
            if "failure" in rows[name]:
                continue
            try:
                found = (
                    apart(partial(memory_cpu, contender, group, shape, DTYPES[dtype]))
                    if inputs is None
                    else memory_cuda(contender, group, inputs)
                )
            except Exception as error:
                rows[name]["memory failure"] = reason(error)
            else:
                rows[name]["peak"], rows[name]["held"] = found or (None, None)
    return tables


def worker(spec: Mapping[str, Any]) -> None:
    """Measure all cases of the spec in an environment that has been set, and write what was found."""
    warnings.filterwarnings("ignore")
    # Once for all the processes forked from this one, which computes nothing itself: threads do not survive a fork.
    for module in ("torch._dynamo", "torch._inductor.compile_fx", "monai.losses", "segmentation_models_pytorch.losses"):
        importlib.import_module(module)
    for module in ("nnunetv2.training.loss.compound_losses", "torchmetrics.segmentation"):
        with suppress(ImportError):  # Its row will say so.
            importlib.import_module(module)
    found: list[list[Any]] = []
    for case in spec["cases"]:
        for dtype in spec["dtypes"]:
            print(f"{spec['allocator']}: {case}, {dtype}", file=sys.stderr, flush=True)
            try:
                found.append([case, dtype, work(case, dtype, spec)])
            except Exception as error:
                failed = groups(case, spec["device"], spec["quick"])
                rows = [{name: {"failure": reason(error)} for name in group.contenders} for group in failed]
                found.append([case, dtype, rows])
            Path(spec["out"]).write_text(json.dumps(found))


SPIN = """
import numpy
a, b = numpy.ones(2**24), numpy.ones(2**24)
while True:
    numpy.add(a, 1, out=b)
    numpy.multiply(b, 0.5, out=a)
"""


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Processes that read and write memory all the while."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measured(spec: dict[str, Any]) -> list[list[Any]]:
    """What a process of its own finds, with its allocator set."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {**spec, "out": str(Path(folder) / "found.json")}
        # One process compiles; a pool of compilers would stay and take memory.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", **ALLOCATORS[spec["allocator"]]}
        command = [sys.executable, "-m", "tests.benchmarks.sums", "--worker", json.dumps(spec)]
        subprocess.run(command, check=True, env=environment)
        found: list[list[Any]] = json.loads(Path(spec["out"]).read_text())
        return found


def collect(spec: dict[str, Any], allocators: Sequence[str], *, busy: bool = False) -> list[dict[str, Any]]:
    """One table for each group of each case and dtype, with the times of all allocators."""
    tables: dict[tuple[str, str, str], dict[str, Any]] = {}
    for allocator in allocators:
        peak = spec["peak"] and allocator == allocators[0]
        for case, dtype, found in measured({**spec, "allocator": allocator, "peak": peak}):
            for group, rows in zip(groups(case, spec["device"], spec["quick"]), found, strict=True):
                facts = {"case": case, "shape": spec["shapes"][case], "dtype": dtype, "group": group.title}
                more = {
                    "unit": group.unit,
                    "backward": group.backward,
                    "busy": busy,
                    "bytes": least_bytes(group, facts),
                }
                table = tables.setdefault((case, dtype, group.title), {**facts, **more, "rows": {}})
                for name, row in rows.items():
                    kept = table["rows"].setdefault(name, {"times": {}})
                    kept |= {key: row.pop(key) for key in ("peak", "held", "memory failure") if key in row}
                    kept["times"][allocator] = row
    return list(tables.values())


def least_bytes(group: Group, facts: Mapping[str, Any]) -> int:
    """Bytes that must be moved: what is needed, read twice where there is a backward, and the gradient written."""
    batch, classes, *space = facts["shape"]
    pixels = batch * math.prod(space)
    logits = pixels * classes * DTYPES[facts["dtype"]].itemsize
    sizes = {"logits": logits, "ids": 8 * pixels, "labels": 8 * pixels, "planes": 4 * pixels}
    read: int = sum(sizes[name] for name in group.needed)
    return 2 * read + logits if group.backward else read


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((s.partition(":")[2].strip() for s in info.read_text().splitlines() if "model name" in s), cpu)
    facts = {"CPU": cpu, "threads": str(torch.get_num_threads()), "Python": platform.python_version()}
    facts["C library"] = " ".join(platform.libc_ver())
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists():
        facts["huge pages"] = pages.read_text().partition("[")[2].partition("]")[0]
    if device == "cuda":
        facts["GPU"] = torch.cuda.get_device_name()
        facts["GPU copy"] = f"{copy_bandwidth():.0f} GB/s read and written"
    for name in ("torch", "triton", "monai", "segmentation-models-pytorch", "nnunetv2", "torchmetrics"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def copy_bandwidth() -> float:
    """GB/s that cloning a large tensor reads and writes on the GPU."""
    large = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    best = math.inf
    for _ in range(10):
        mark, seconds = marks("cuda")
        mark()
        large.clone()
        mark()
        best = min(best, *seconds())
    return 2 * large.nbytes / best / 1e9


def cells(row: Mapping[str, Any], *, backward: bool, base: bool) -> str:
    """Milliseconds, ratio and its quartiles."""
    if "failure" in row:
        return f" {row['failure']} | | |"
    forward, back = (1000 * statistics.median(row[key]) for key in ("forward", "backward"))
    both = f"{forward:.2f} + {back:.2f}" if backward and back else f"{forward:.2f}"
    if base:
        return f" {both} | 1 | |"
    ratios = row["ratios"]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return f" {both} | {statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} |"


def show(table: Mapping[str, Any], allocators: Sequence[str], device: str) -> None:
    """Print a table."""
    shape, rows = "x".join(map(str, table["shape"])), table["rows"]
    loaded = ", all cores loaded" if table["busy"] else ""
    print(f"**{table['group']}, {shape}, {table['dtype']}{loaded}**\n")
    unit = {"logits": "logits", "ids": "labels"}[table["unit"]]
    what = "ms, forward + backward" if table["backward"] else "ms"
    names = [ALLOCATOR_TITLES[allocator] for allocator in allocators] if device == "cpu" else [device]
    heads = "".join(f" {name}: {what} | ratio | quartiles |" for name in names)
    peak = not table["busy"]
    print(f"| |{heads}" + (f" peak, {unit} | held, {unit} |" if peak else ""))
    print("|---" * (1 + 3 * len(allocators) + 2 * peak) + "|")
    for name, row in rows.items():
        line = f"| {name} |"
        for allocator in allocators:
            times = row["times"][allocator]
            line += cells(times, backward=table["backward"], base=times.get("base") == name)
        if peak:
            memory = [row.get(key) for key in ("peak", "held")]
            line += f" {row.get('memory failure') or text(memory[0])} | {text(memory[1])} |"
        print(line)
    print(remarks(table, allocators, device))


def text(value: float | None) -> str:
    """A number of a table, which may be missing."""
    return "" if value is None else f"{value:.2f}"


def remarks(table: Mapping[str, Any], allocators: Sequence[str], device: str) -> str:
    """What stands below a table: how near ours comes to a copy, and fresh memory where it should have been kept."""
    lines = []
    rows, size = table["rows"], table["bytes"]
    logits = math.prod(table["shape"]) * DTYPES[table["dtype"]].itemsize
    for allocator in allocators:
        ours, clone = (rows.get(name, {}).get("times", {}).get(allocator, {}) for name in ("ours", "logits.clone()"))
        if "forward" not in ours:
            continue
        rate = size / (statistics.median(ours["forward"]) + statistics.median(ours["backward"])) / 1e9
        share = ""
        if "forward" in clone:
            copied = 2 * logits / statistics.median(clone["forward"]) / 1e9
            share = f", {rate / copied:.0%} of what clone() reaches, {copied:.1f} GB/s"
        where = f" ({ALLOCATOR_TITLES[allocator]})" if device == "cpu" else ""
        lines.append(f"Ours moves its least bytes, {size / 2**20:.4g} MiB, at {rate:.1f} GB/s{share}{where}.")
        fresh = {name: row["times"][allocator].get("fresh", 0) for name, row in rows.items()}
        if allocator == "kept" and max(fresh.values()) > 0.1:
            unkept = ", ".join(f"{name} {value:.1f}" for name, value in fresh.items() if value > 0.1)
            lines.append(f"Fresh memory in a call even so, in {table['unit']}: {unkept}.")
    return "\n" + "  \n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print Markdown tables, and write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sums", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--allocator", nargs="+", choices=ALLOCATORS, default=["default", "kept"], help="on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of a table's rounds, about; default: 5")
    parser.add_argument("--busy", action="store_true", help="the case of 19 classes again, with all cores loaded")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds, nothing compiled: a test")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
        worker(json.loads(given.worker))
        return
    spec = {
        "cases": given.cases,
        "dtypes": given.dtype,
        "device": given.device,
        "budget": 0.0 if given.quick else given.budget,
        "quick": given.quick,
        "shapes": QUICK if given.quick else SHAPES,
        "peak": True,
    }
    allocators = given.allocator if given.device == "cpu" else ["default"]
    facts = machine(given.device)
    print("; ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    tables = collect(spec, allocators)
    if given.busy:
        with load(os.cpu_count() or 1):
            tables += collect({**spec, "cases": ["19"], "peak": False}, allocators, busy=True)
    for table in tables:
        show(table, allocators, given.device)
    if given.json is not None:
        found = {"machine": facts, "device": given.device, "allocators": allocators, "tables": tables}
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""No checkpoint is lost: not by a full disk, a lost folder, a process that is killed, nor by a damaged file."""

from __future__ import annotations

import errno
import os
import shutil
import time

import pytest
import torch

from lightning_dice import checkpoints
from lightning_dice.checkpoints import SafeCheckpointIO, newest_readable, remove_partial_files, retry_writing
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.run_folder import newest_checkpoint


def state(step: int) -> dict[str, object]:
    return {"global_step": step, "state_dict": {"weight": torch.full((1000,), float(step))}}


def step(path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


@pytest.fixture
def naps(monkeypatch):
    """Seconds slept, which pass at once."""
    clock, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return slept


def test_the_former_one_stays(tmp_path):
    writer = SafeCheckpointIO()
    for number in range(3):
        writer.save_checkpoint(state(number), tmp_path / "last.ckpt")
        writer.save_checkpoint(state(number), tmp_path / "best.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt", "last.former.ckpt"]
    assert step(tmp_path / "last.ckpt") == 2
    assert step(tmp_path / "last.former.ckpt") == 1


def test_it_stays_where_files_have_no_second_name(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for number in range(2):
        SafeCheckpointIO().save_checkpoint(state(number), tmp_path / "last.ckpt")
    assert [step(tmp_path / name) for name in ("last.former.ckpt", "last.ckpt")] == [0, 1]


@pytest.mark.parametrize("moment", ["link", "replace", "fsync"])
def test_killed_at_any_moment_of_writing(tmp_path, moment, monkeypatch):
    """After whatever call the process ends, last.ckpt is whole."""
    path = tmp_path / "last.ckpt"
    for number in range(2):
        SafeCheckpointIO().save_checkpoint(state(number), path)
    original = getattr(os, moment)
    for before in (True, False):
        calls = 0
        while True:
            calls += 1
            seen = 0

            class Killed(BaseException):
                pass

            def killing(*arguments, number=calls, before=before, end=Killed):
                nonlocal seen
                seen += 1
                if seen == number and before:
                    raise end
                result = original(*arguments)
                if seen == number:
                    raise end
                return result

            monkeypatch.setattr(os, moment, killing)
            try:
                SafeCheckpointIO().save_checkpoint(state(7), path)
                break
            except Killed:
                assert step(path) in (1, 7)
                assert newest_readable(tmp_path) == path
            finally:
                monkeypatch.setattr(os, moment, original)
        assert calls > 1


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(state(0), path)
    waits = []

    def room_in_the_end(seconds):
        assert step(path) == 0
        waits.append(seconds)
        if len(waits) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(time, "sleep", room_in_the_end)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        SafeCheckpointIO().save_checkpoint(state(1), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert waits == [1.0, 2.0, 4.0]
    assert step(path) == 1
    message = capsys.readouterr().err
    assert message.count("last.ckpt could not be written: ") == 3
    assert "The training waits, and tries again for 600 s." in message


def test_not_for_ever(naps, capsys):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        retry_writing(fail, 100.0, "it")
    assert sum(naps) == pytest.approx(100)
    assert max(naps) == 30


def test_a_folder_that_was_lost(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(state(0), path)
    shutil.rmtree(tmp_path / "run")
    SafeCheckpointIO().save_checkpoint(state(1), path)
    assert step(path) == 1


def test_other_mistakes_are_not_retried(naps):
    def fail():
        raise TypeError("not a state")

    with pytest.raises(TypeError):
        retry_writing(fail, 100.0, "it")
    assert naps == []


def test_patience_is_a_number_of_seconds():
    with pytest.raises(ValueError, match="patience must be a number of seconds >= 0, got -1"):
        SafeCheckpointIO(patience=-1)


class TestNewest:
    @pytest.fixture
    def folder(self, tmp_path):
        for number in range(2):
            SafeCheckpointIO().save_checkpoint(state(number), tmp_path / "last.ckpt")
        SafeCheckpointIO().save_checkpoint(state(5), tmp_path / "best.ckpt")
        return tmp_path

    def test_the_last(self, folder):
        assert newest_readable(folder) == folder / "last.ckpt"

    @pytest.mark.parametrize("left", [0, 10, 0.5, 0.99])
    def test_the_one_before_a_truncated_one(self, folder, left):
        path = folder / "last.ckpt"
        data = path.read_bytes()
        path.unlink()  # Not through the other name.
        path.write_bytes(data[: int(left * len(data)) if left < 1 else left])
        with pytest.warns(UserWarning, match=r"damaged: .*last\.ckpt.*resuming from .*last\.former\.ckpt, which is ol"):
            assert newest_readable(folder) == folder / "last.former.ckpt"

    def test_the_one_before_one_that_is_damaged_within(self, folder):
        path = folder / "last.ckpt"
        data = bytearray(path.read_bytes())
        start = bytes(data).index(torch.full((4,), 1.0).numpy().tobytes())
        data[start : start + 100] = bytes(100)
        path.unlink()
        path.write_bytes(data)
        with pytest.warns(UserWarning, match=r"last\.ckpt \(the checksum of .* is wrong\)"):
            assert newest_readable(folder) == folder / "last.former.ckpt"

    def test_any_other_in_the_end(self, folder):
        for name in ("last.ckpt", "last.former.ckpt"):
            (folder / name).write_bytes(b"nothing")
        with pytest.warns(UserWarning, match="damaged"):
            assert newest_readable(folder) == folder / "best.ckpt"

    def test_none_yet(self, tmp_path):
        assert newest_readable(tmp_path) is None
        assert newest_checkpoint(tmp_path / "run") is None

    def test_all_damaged(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"nothing")
        with pytest.raises(UserError, match=r"no checkpoint can be read: .*last\.ckpt"):
            newest_checkpoint(tmp_path)

    def test_what_a_killed_process_left_is_removed(self, folder):
        part = folder / ".last.123.part.ckpt"
        part.write_bytes(b"half")
        remove_partial_files(folder)
        assert not part.exists()
        assert len(list(folder.iterdir())) == 3


def test_the_trainer_writes_by_it(tmp_path):
    from training import train

    seen = []

    class Noting(SafeCheckpointIO):
        def save_checkpoint(self, *arguments, **settings):
            seen.append(arguments[1])
            super().save_checkpoint(*arguments, **settings)

    train(tmp_path, epochs=1, plugins=[Noting()])
    assert len(seen) == 6
    assert checkpoints.newest_readable(tmp_path) is not None

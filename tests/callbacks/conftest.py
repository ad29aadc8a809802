"""Trainers, networks and loaders for the tests of callbacks."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from squares import Cases, Net, load


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "lightning.pytorch")


@pytest.fixture
def loader():
    return lambda count=4, batch_size=2, **kwargs: load(Cases(count, **kwargs), batch_size)


@pytest.fixture
def net():
    def make(**kwargs):
        torch.manual_seed(0)
        return Net(**kwargs)

    return make


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks, **kwargs):
        settings = {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            "default_root_dir": tmp_path / "root",
            "num_sanity_val_steps": 1,
        }
        return pl.Trainer(callbacks=list(callbacks), **settings | kwargs)

    return make


# Beside the project's own filters.
WARNINGS = (
    "ignore:.*ended before the epoch ended",  # resuming there is what is tested
    "ignore:.*exists and is not empty",  # so is resuming in place
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "callbacks" in item.path.parts and "tests" in item.path.parts:
            for warning in WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))

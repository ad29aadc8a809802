"""What a resumed session changes in a checkpoint."""

from __future__ import annotations

from lightning_dice.session import follow_folder


def test_callbacks_follow_a_folder_that_was_moved():
    state = {
        "dirpath": "/old/run/checkpoints",
        "best_model_path": "/old/run/checkpoints/best.ckpt",
        "best_k_models": {"/old/run/checkpoints/best.ckpt": 0.5},
        "monitor": "val/dice",
        "other": "/old/run-2/best.ckpt",
        "best_model_score": 0.5,
    }
    checkpoint = {"callbacks": {"ModelCheckpoint": state}}
    follow_folder(checkpoint, "/old/run", "/new")
    assert checkpoint["callbacks"]["ModelCheckpoint"] == {
        "dirpath": "/new/checkpoints",
        "best_model_path": "/new/checkpoints/best.ckpt",
        "best_k_models": {"/new/checkpoints/best.ckpt": 0.5},
        "monitor": "val/dice",
        "other": "/old/run-2/best.ckpt",
        "best_model_score": 0.5,
    }

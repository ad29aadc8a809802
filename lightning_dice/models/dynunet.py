"""MONAI's DynUNet, with levels of deep supervision that keep their sizes."""

from __future__ import annotations

from typing import Any

from monai.networks.nets.dynunet import DynUNet as _DynUNet
from torch import Tensor


class DynUNet(_DynUNet):
    """nnU-Net's architecture, as in `monai.networks.nets.DynUNet`, which returns a list of levels in training.

    MONAI enlarges the coarser levels to the size of the finest and stacks them. Here they keep their sizes, finest
    first, and `lightning_dice.losses.DeepSupervision` reduces the masks to each level instead, which takes less memory.
    Weights have the same names as MONAI's, and can be loaded from either.

    Args:
        upsample_kernel_size: kernel sizes of the transposed convolutions; by default those that undo `strides`.
        settings: the settings of MONAI's class.

    >>> import torch
    >>> net = DynUNet(spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2],
    ...               filters=[4, 8, 8], deep_supervision=True)
    >>> [tuple(level.shape) for level in net(torch.zeros(2, 1, 8, 8))]
    [(2, 2, 8, 8), (2, 2, 4, 4)]
    >>> net.eval()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 2, 8, 8])
    """

    def __init__(self, *, upsample_kernel_size: Any = None, **settings: Any) -> None:
        strides = settings["strides"]
        super().__init__(upsample_kernel_size=upsample_kernel_size or strides[1:], **settings)

    def forward(self, x: Tensor) -> Any:
        """Return logits `(batch, classes, *space)`; in training with deep supervision a list of them, finest first."""
        finest = self.output_block(self.skip_layers(x))
        levels = [finest, *self.heads]
        # MONAI's blocks store their outputs in `heads`. They would keep this step's graph alive, and prevent copies of
        # the network.
        self.heads[:] = [finest.new_zeros(0)] * len(self.heads)
        return levels if self.training and self.deep_supervision else finest

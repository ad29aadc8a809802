"""MONAI's DynUNet, whose levels of deep supervision keep their sizes."""

from __future__ import annotations

from typing import Any

from monai.networks.nets.dynunet import DynUNet as _DynUNet
from torch import Tensor


class DynUNet(_DynUNet):
    """nnU-Net's architecture as `monai.networks.nets.DynUNet`, with a list of levels in training.

    MONAI enlarges the coarser levels to the size of the finest and stacks them; here they stay as they are, finest
    first, so that masks are reduced to each level instead (`lightning_dice.losses.DeepSupervision`), at less memory.
    Weights have MONAI's names and are exchangeable.

    Args:
        upsample_kernel_size: of the transposed convolutions; by default what undoes `strides`.
        settings: of MONAI's class.

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
        """Logits `(batch, classes, *space)`; in training with deep supervision a list of them, finest first."""
        finest = self.output_block(self.skip_layers(x))
        levels = [finest, *self.heads]
        # The blocks have left them there; kept, they would keep this step's graph, and a copy of the network from being
        # made.
        self.heads[:] = [finest.new_zeros(0)] * len(self.heads)
        return levels if self.training and self.deep_supervision else finest

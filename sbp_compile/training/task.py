"""A data set as tensors on a device, and batches of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sbp_compile.training.data import ImageData, to_tensor
from sbp_compile.training.files import DatasetError

_SHIFT = 4


class Task:
    """Images (N, C, H, W) in [0, 1] with labels (N,); `augment`: batches are flipped and shifted at random.

    `random_labels`: a seed for labels of the training images that have nothing to do with them (Zhang et al. 2017,
    arXiv 1611.03530); the test labels stay. Raises DatasetError for a set without images.
    """

    def __init__(
        self, data: ImageData, *, device: str = "cpu", augment: bool = False, random_labels: int | None = None
    ) -> None:
        if not len(data.train_images) or not len(data.test_images):
            raise DatasetError("the data set has no images: check its files")
        self.device, self.augment = torch.device(device), augment
        self.images = to_tensor(data.train_images).to(self.device)
        labels = torch.from_numpy(data.train_labels)
        if random_labels is not None:
            generator = torch.Generator().manual_seed(random_labels)
            labels = labels[torch.randperm(len(labels), generator=generator)]
        self.labels = labels.to(self.device)
        self.test_images = to_tensor(data.test_images).to(self.device)
        self.test_labels = torch.from_numpy(data.test_labels).to(self.device)
        self.example = self.test_images[:2]

    @property
    def classes(self) -> int:
        """How many classes the labels speak of."""
        return int(max(self.labels.max(), self.test_labels.max())) + 1

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the training images of `index` and their labels."""
        images = self.images[index]
        return (_augmented(images) if self.augment else images), self.labels[index]


def _augmented(images: Tensor) -> Tensor:
    """Shift by up to 4 pixels, what comes in being black, and mirror half of them (He et al. 2016, section 4.2)."""
    count, _, height, width = images.shape
    padded = F.pad(images, (_SHIFT,) * 4)
    rows, columns = (torch.randint(2 * _SHIFT + 1, (count, 1), device=images.device) for _ in range(2))
    rows = rows + torch.arange(height, device=images.device)
    columns = columns + torch.arange(width, device=images.device)
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    example = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

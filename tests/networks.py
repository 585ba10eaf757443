"""Networks from elsewhere, and statistics for them, as the doctor's tests need them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


class Block(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-18 with torchvision's names for everything, `width` channels instead of 64."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i in range(4):
            c_in, c_out = width << max(i - 1, 0), width << i
            blocks = nn.Sequential(Block(c_in, c_out, 2 if i else 1), Block(c_out, c_out, 1))
            setattr(self, f"layer{i + 1}", blocks)
        self.fc = nn.Linear(width << 3, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.maxpool(relu(self.bn1(self.conv1(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(h.mean((2, 3)))


def pictures(n: int, seed: int = 0, size: int = 32) -> Tensor:
    """Random images (n, 3, size, size) with a mean and a contrast of their own each channel."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, size, size, generator=rng)
    return 0.25 * x + torch.tensor([0.49, 0.48, 0.45]).view(1, 3, 1, 1)


@torch.no_grad()
def settle(model: nn.Module, steps: int = 80, batch: int = 16, size: int = 32) -> nn.Module:
    """Let running statistics come to rest on pictures; weights stay as they are."""
    model.train()
    for step in range(steps):
        model(pictures(batch, seed=step, size=size))
    return model.eval()

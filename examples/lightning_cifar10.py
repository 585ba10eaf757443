"""A Lightning module with normlab's callbacks, on the 600 pictures of the sample."""

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import normlab
from normlab.callbacks.lightning import Checkup, History, Watch


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, momentum=0.01), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64, momentum=0.01), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 36, 10),
        )  # fmt: skip

    def training_step(self, batch, index):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        right = self.net(batch[0]).argmax(1) == batch[1]
        self.log("val_acc", right.float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.003, momentum=0.9)


def loader(images, labels, shuffle):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    data = TensorDataset(pixels, torch.from_numpy(labels).long())
    return DataLoader(data, batch_size=32, shuffle=shuffle)


seed_everything(0)
sample = normlab.load("sample")
trainer = Trainer(
    max_epochs=8,
    callbacks=[Watch("watched", every=20), Checkup(), History("watched")],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(
    Module(),
    loader(sample.x_train, sample.y_train, shuffle=True),
    loader(sample.x_test, sample.y_test, shuffle=False),
)

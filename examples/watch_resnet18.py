"""torchvision's resnet18 in a plain loop, watched: with its normalisations, or without.

python watch_resnet18.py --norm batch --out watched/batch
python watch_resnet18.py --norm none --out watched/none
normlab inspect watched/batch watched/none
"""

import argparse

import torch
from torch.nn import Identity
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

import normlab

parser = argparse.ArgumentParser()
parser.add_argument("--norm", choices=["batch", "none"], default="batch")
parser.add_argument("--rate", type=float, default=0.003)
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--out", default="watched")
arguments = parser.parse_args()

torch.manual_seed(0)
data = normlab.load("sample")  # 600 pictures of CIFAR-10
x = torch.from_numpy(data.x_train).permute(0, 3, 1, 2) / 255
y = torch.from_numpy(data.y_train).long()
model = resnet18(num_classes=10, norm_layer=None if arguments.norm == "batch" else Identity)
optimizer = torch.optim.SGD(model.parameters(), arguments.rate, momentum=0.9)
checkup = normlab.Checkup(model)
label = "with batch normalisation" if arguments.norm == "batch" else "without"

with normlab.watch(model, arguments.out, every=20, optimizer=optimizer, label=label) as watch:
    for step in range(arguments.steps):
        chosen = torch.randint(len(x), (32,))
        loss = cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step(loss)
        if (step + 1) % 20 == 0:
            checkup.end_epoch()
            print(f"step {step + 1}: loss {loss:.3f}")

"""The numbers of each optimiser; `normlab.training.optimisers` has their formulas."""

from dataclasses import dataclass
from typing import Any, ClassVar

from normlab.recipes.settings import in_range, setting

_RATE = {
    "allowed": in_range(0, float("inf"), low_open=True),
    "remedy": "choose a finite rate above 0",
}
_DECAY = {"allowed": in_range(0, 1, high_open=True), "remedy": "choose a share in [0, 1)"}


def _rate(default: float) -> Any:
    return setting(default, "The optimiser's learning rate.", **_RATE)


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam in Keras' form, whose ε stands beside √v before the bias is corrected."""

    name: ClassVar[str] = "adam"
    learning_rate: float = _rate(1e-3)
    beta1: float = setting(0.9, "Adam's decay of the mean of gradients.", **_DECAY)
    beta2: float = setting(0.999, "Adam's decay of the mean of squares.", **_DECAY)
    epsilon: float = setting(1e-7, "Adam's ε.", name="adam_epsilon", **_RATE)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent without momentum."""

    name: ClassVar[str] = "sgd"
    learning_rate: float = _rate(0.1)


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for the convolutions' kernels, Nesterov SGD for everything else.

    `learning_rate` is an angle: how far a step turns each filter. It hangs together with the batch
    size and the number of steps. `sgd_rate` times `weight_decay` is one number for dense weights,
    biases, γ and β.
    """

    name: ClassVar[str] = "muon"
    learning_rate: float = _rate(0.15)
    momentum: float = setting(0.6, "Muon's momentum, of the convolutions' kernels.", **_DECAY)
    newton_schulz_steps: int = setting(
        3,
        "Muon's steps of orthogonalisation.",
        allowed=in_range(1, 20),
        remedy="choose 1 to 20",
    )
    newton_schulz_products: str = setting(
        "float32",
        "What Muon multiplies, from 128 rows on; bfloat16 where the processor has it.",
        names=("float32", "bfloat16"),
    )
    sgd_rate: float = setting(0.37, "With muon: the learning rate of dense weights.", **_RATE)
    sgd_momentum: float = setting(
        0.85, "With muon: Nesterov momentum of all but kernels.", **_DECAY
    )
    bias_factor: float = setting(
        8.0, "With muon: how much higher the rate of biases, γ and β is.", **_RATE
    )
    weight_decay: float = setting(1.3e-3, "With muon: weight decay of all but kernels.", **_DECAY)


Optimizer = Adam | SGD | Muon
OPTIMIZERS: dict[str, type[Optimizer]] = {kind.name: kind for kind in (Adam, SGD, Muon)}

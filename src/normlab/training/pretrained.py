"""Networks that were pretrained elsewhere: named, fetched or read from a file, and checked.

    resnet18.a1_in1k          a name in timm, whose weights the hub has
    resnet18=weights.pth      the weights in this file
    weights/resnet18.pth      the same, where the file's name says what it is

Files are read by normlab's own readers, which run nothing.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from normlab.core.tensors import read_safetensors
from normlab.errors import DataError, UserError
from normlab.formats.torch_files import read_torch
from normlab.models.timm_net import batch_norms, config_of, load_timm
from normlab.recipes import get
from normlab.runs import Origin, Run, Task
from normlab.text import listed, shown

# What wraps a network for training leaves its name before every other.
WRAPPERS = ("_orig_mod.", "module.", "model.", "body.", "backbone.", "encoder.", "net.")
# Where checkpoints of training scripts keep weights, best first: averaged ones score higher.
PLACES = ("state_dict_ema", "model_ema", "state_dict", "model", "")
FILES = ("model.safetensors", "pytorch_model.bin")  # on the hub, the safe one first


@dataclass(frozen=True)
class Pretrained(Run):
    """A pretrained network as what a training starts from: a run without a folder.

    Attributes:
        weights: of the body, by the names that timm has for them.
        origin: where they come from.
    """

    weights: Mapping[str, Tensor]
    origin: Origin

    def model(self, weights: str = "kept") -> nn.Module:
        """The network in evaluation mode, its output layer untrained."""
        model = self.task.build()
        model.get_submodule("body").load_state_dict(self.weights)
        return model.eval()


def open_pretrained(start: str | Path) -> Pretrained:
    """Read the weights of a network of timm, from a file or from the hub.

    Raises:
        UserError: timm is missing; neither a network of that name nor such a file; weights that do
            not fit the network, or cannot be had.
    """
    name, file = _named(str(start))
    if file is None:
        file, source = _from_hub(name)
    else:
        source = f"the file {file.name}"
    digest = _sha256(file)
    arrays = read_weights(file)
    if not name:
        name = _guess(file, arrays)
    config = config_of(name)
    body = load_timm().create_model(name, num_classes=0)
    weights = fit_names(arrays, body, config.get("classifier"), f"{file.name}, for {name}")
    norms = batch_norms(body)
    recipe = get("pretrained").with_settings(
        {
            "architecture": name,
            "norm": "batch" if norms else "none",
            **({"norm_epsilon": norms[0].eps} if norms else {}),
        }
    )
    licence = str(config.get("license") or "not stated")
    if not source.startswith("hub"):
        licence = f"not stated in the file; of timm's own weights {licence}"
    origin = Origin(
        network=name,
        library=f"timm {load_timm().__version__}",
        source=source,
        file_sha256=digest,
        licence=licence,
    )
    task = Task(
        recipe=recipe,
        seed=0,
        data="ImageNet",
        data_sha256="",
        class_names=("",),
        image_size=int(config["input_size"][-1]),
    )
    return Pretrained(Path(str(start)), task, weights, origin)


def _named(text: str) -> tuple[str, Path | None]:
    """The name and the file in what stands behind --from; either may be missing."""
    if Path(text).is_file():
        return "", Path(text)
    name, equals, file = text.partition("=")
    if equals:
        if not Path(file).is_file():
            raise DataError(f"{shown(file)} is no file: give NAME=FILE, a file of weights")
        config_of(name)
        return name, Path(file)
    name = name.removeprefix("hf-hub:").removeprefix("timm/")
    try:
        if "/" in name or os.sep in name:
            raise UserError("its networks have no such names")
        config_of(name)
    except UserError as e:
        raise UserError(
            f"{shown(text)} is no run's folder, no file of weights and no network of timm ({e})"
        ) from None
    return name, None


def read_weights(file: Path) -> dict[str, Tensor]:
    """The weights in a file of safetensors or of `torch.save`; nothing in it is run.

    Of a checkpoint that holds several state dicts, the averaged one, if there is one.

    Raises:
        DataError: it is damaged, or holds none.
    """
    with open(file, "rb") as f:
        head = f.read(9)
    if file.suffix == ".safetensors" or head[8:9] == b"{":
        try:
            tensors, _ = read_safetensors(file)
            return tensors
        except SafetensorError as e:
            raise DataError(f"{shown(file)} is not a whole safetensors file ({e})") from None
    parts = {part.place: part for part in read_torch(file).state_dicts}
    chosen = next((p for p in PLACES if p in parts), None)
    if chosen is None:
        chosen = max(parts, key=lambda place: len(parts[place].arrays))
    if unread := parts[chosen].unread:
        name, reason = next(iter(unread.items()))
        raise DataError(f"{shown(file)}: {len(unread)} tensors cannot be read ({name}: {reason})")
    return {name: torch.from_numpy(np.array(a)) for name, a in parts[chosen].arrays.items()}


def fit_names(
    found: Mapping[str, Tensor], body: nn.Module, classifier: Any, where: str
) -> dict[str, Tensor]:
    """The weights of `body`, of those found in a file, under the names that timm has for them.

    By name, wrappers' prefixes taken off; or else in their order, where every one has the shape
    and the kind (weight, bias, running_mean, …) of its counterpart: other libraries give the same
    network other names. The classifier is left out.

    Args:
        classifier: timm's name of it, or names.

    Raises:
        DataError: they are another network's; `where` begins the message.
    """
    wanted = {k: v for k, v in body.state_dict().items() if not k.endswith("num_batches_tracked")}
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    weights = {k: v for k, v in _unwrapped(found).items() if not k.endswith("num_batches_tracked")}
    ours = {k: v for k, v in weights.items() if k.rpartition(".")[0] not in heads}
    if ours.keys() != wanted.keys():
        ours = _in_order(weights, wanted) or ours
    odd = [
        *(k for k in wanted if k not in ours or ours[k].shape != wanted[k].shape),
        *(k for k in ours if k not in wanted),
    ]
    if odd:
        raise DataError(
            f"{where}: the weights are another network's: {len(odd):,} of {len(wanted):,} tensors "
            f"are missing, too many or of another shape ({listed(odd, 3)}): name the network, "
            "--from NAME=FILE"
        )
    if bad := [k for k, v in ours.items() if not v.isfinite().all()]:
        raise DataError(f"{where}: {listed(bad, 3)} hold NaN or infinite values: get the file anew")
    counters = {k: v for k, v in body.state_dict().items() if k not in wanted}
    return {**counters, **{k: v.to(wanted[k].dtype) for k, v in ours.items()}}


def _unwrapped(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = dict(found)
    while prefix := next(
        (w for w in WRAPPERS if weights and all(k.startswith(w) for k in weights)), None
    ):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def _in_order(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Each of the first weights under the name of its counterpart; behind them only a classifier
    may follow.
    """
    rest = list(weights.items())[len(wanted) :]
    if len(weights) < len(wanted) or [v.ndim for _, v in rest] not in ([], [2], [2, 1]):
        return None
    renamed = {}
    for (name, value), (key, target) in zip(weights.items(), wanted.items(), strict=False):
        if value.shape != target.shape or name.rpartition(".")[2] != key.rpartition(".")[2]:
            return None
        renamed[key] = value
    return renamed


def _guess(file: Path, found: Mapping[str, Tensor]) -> str:
    """The network that a file's name begins with and its weights fit.

    Raises:
        DataError: none, or several.
    """
    stem = re.sub(r"[^a-z0-9.]+", "_", file.stem.lower())
    fits = list(_fitting(stem, found))
    if len(fits) == 1:
        return fits[0]
    why = f"fit {listed(fits, 4)} alike" if fits else "do not say whose they are"
    raise DataError(
        f"{shown(file)}: its name and weights {why}: name the network, "
        f"--from {fits[0] if fits else 'NAME'}={shown(file)}"
    )


def _fitting(stem: str, found: Mapping[str, Tensor]) -> Iterator[str]:
    timm = load_timm()
    names = [n for n in timm.list_models() if stem.startswith((n, n.removeprefix("tf_")))]
    longest = max((len(n.removeprefix("tf_")) for n in names), default=0)
    for name in names:
        if len(name.removeprefix("tf_")) < longest:
            continue
        body = timm.create_model(name, num_classes=0)
        try:
            fit_names(found, body, config_of(name).get("classifier"), "")
        except DataError:
            continue
        yield name


def _from_hub(name: str) -> tuple[Path, str]:
    """The file of timm's weights of a network, from the hub or its cache on this machine.

    Raises:
        UserError: it has none there, or they cannot be had.
    """
    config = config_of(name)
    repository, _, revision = str(config.get("hf_hub_id") or "").partition("@")
    if not repository:
        raise UserError(
            f"timm has no weights of {name} on the hub: give a file of them, --from {name}=FILE"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # type: ignore[no-untyped-call]  # it would tell each try; the last one's reason is ours to tell

    for file in FILES:
        try:
            path = Path(hf_hub_download(repository, file, revision=revision or None))
        except Exception as e:  # whatever the hub's client raises: no network, no rights, no room
            if isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError):
                continue
            cause = e.__cause__ or e
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise UserError(
                f"the weights of {name} cannot be had from the hub ({reason}): fetch {file} of "
                f"{repository} elsewhere and give --from {name}=FILE"
            ) from None
        blob = path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", blob) and blob != _sha256(path):
            raise DataError(f"{path} does not match its SHA-256 on the hub: remove it, try again")
        return path, f"hub {repository}, revision {path.parent.name[:12]}"
    raise UserError(f"{repository} on the hub holds no {' and no '.join(FILES)}")


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

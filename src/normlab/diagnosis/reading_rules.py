"""Rules on the examination itself: whether there was something to examine, and all of it was.

"Nothing found" says that a model is healthy only where something was looked at.
"""

from collections.abc import Iterator

from normlab.diagnosis.network import Network
from normlab.diagnosis.rule import Observation, rule


@rule(
    worst="serious",
    remedy="where the network has none, there is nothing to examine; where it has, tell the place "
    "of its running_mean and running_var in an issue, or give the live module to normlab.doctor",
    source="docs/doctor.md, what is searched",
)
def no_normalizer(network: Network) -> Iterator[Observation]:
    """No batch normalisation was found, so none was examined.

    Serious; a note where the network is known to be meant without.
    """
    if network.normalizers or network.unread:
        return
    if network.meant_without:
        yield Observation("model", "note", f"there is none: {network.meant_without}")
        return
    if network.absence:
        yield Observation("model", "serious", network.absence)
        return
    tensors = f"{len(network.tensors):,} tensors were" if network.tensors else "nothing was"
    yield Observation("model", "serious", f"{tensors} examined, and none is a running variance")


@rule(
    worst="serious",
    remedy="save the network's state_dict() again, on the CPU, in ordinary tensors of float32",
    source="docs/doctor.md, what is searched",
)
def not_read(network: Network) -> Iterator[Observation]:
    """Some of the file could not be read, so it was not examined.

    Serious for a batch normalisation, a note for another tensor.
    """
    total = len({n.name for n in network.normalizers} | {*network.unread})
    for name, reason in network.unread.items():
        count = f"{len(network.unread):,} of {total:,} batch normalisations could not be read"
        yield Observation(name, "serious", f"{count}: {reason}")
    for name, reason in network.unread_tensors.items():
        yield Observation(name, "note", f"the tensor could not be read: {reason}")
    if "eps" in network.facts:
        for n in network.normalizers:
            if n.eps is None:
                lacking = "its ε and momentum are not in the file, so no rule on them was checked"
                yield Observation(n.name, "note", lacking)

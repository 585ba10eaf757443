"""Rules on the examination itself: whether there was something to examine, and all of it was.

"Nothing found" says that a model is healthy only where something was looked at.
"""

from collections.abc import Iterator

from normlab.diagnosis.patient import Patient
from normlab.diagnosis.rule import Sign, rule


@rule(
    worst="serious",
    remedy="where the network has none, there is nothing to examine; where it has, tell the place "
    "of its running_mean and running_var in an issue, or give the live module to normlab.doctor",
    source="docs/doctor.md, what is searched",
)
def no_normalizer(patient: Patient) -> Iterator[Sign]:
    """No batch normalisation was found, so none was examined.

    Serious; a note where the network is known to be meant without.
    """
    if patient.normalizers or patient.unread:
        return
    if patient.meant_without:
        yield Sign("model", "note", f"there is none: {patient.meant_without}")
        return
    if patient.absence:
        yield Sign("model", "serious", patient.absence)
        return
    tensors = f"{len(patient.tensors):,} tensors were" if patient.tensors else "nothing was"
    yield Sign("model", "serious", f"{tensors} examined, and none is a running variance")


@rule(
    worst="serious",
    remedy="save the network's state_dict() again, on the CPU, in ordinary tensors of float32",
    source="docs/doctor.md, what is searched",
)
def not_read(patient: Patient) -> Iterator[Sign]:
    """Some of the file could not be read, so it was not examined.

    Serious for a batch normalisation, a note for another tensor.
    """
    total = len({n.name for n in patient.normalizers} | {*patient.unread})
    for name, reason in patient.unread.items():
        count = f"{len(patient.unread):,} of {total:,} batch normalisations could not be read"
        yield Sign(name, "serious", f"{count}: {reason}")
    for name, reason in patient.unread_tensors.items():
        yield Sign(name, "note", f"the tensor could not be read: {reason}")
    if "eps" in patient.facts:
        for n in patient.normalizers:
            if n.eps is None:
                lacking = "its ε and momentum are not in the file, so no rule on them was checked"
                yield Sign(n.name, "note", lacking)

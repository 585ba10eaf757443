"""What is odd in a data set, before anything is trained on it: copies, labels, pictures."""

from normlab.curation.check import Check, as_record, check
from normlab.curation.pictures import Pictures, read_pictures

__all__ = ["Check", "Pictures", "as_record", "check", "read_pictures"]

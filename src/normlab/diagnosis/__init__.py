"""What is wrong with a batch-normalised model, and what to do about it."""

from normlab.diagnosis.examination import doctor, examine
from normlab.diagnosis.findings import Diagnosis, Finding
from normlab.diagnosis.rules import RULES

__all__ = ["RULES", "Diagnosis", "Finding", "doctor", "examine"]

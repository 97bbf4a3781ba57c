"""What was lost and what was gained, for people, for programs and for the hub."""

from .data import Report, Subject
from .report import Written, write_report

__all__ = ["Report", "Subject", "Written", "write_report"]

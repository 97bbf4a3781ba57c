"""What was lost and what was gained, for people, for programs and for the hub."""

from .data import Compensation, Report, Sizing, Subject
from .report import Written, write_report

__all__ = ["Compensation", "Report", "Sizing", "Subject", "Written", "write_report"]

"""What a failed job leaves on the screen. A mistake of the user's is one line, the last, and is not tried again.

Snakemake prints the failed command three times over, its whole log, and starts the job anew, which helps nobody who has
to correct a file. `FailedJobs` watches what Snakemake logs, the one place that says under every executor that a job has
failed. All other failures are printed and tried again as Snakemake does it.
"""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from snakemake_interface_logger_plugins.common import LogEvent

from milepost.common.errors import USER_ERROR


class FailedJobs(logging.Filter):
    """A filter of Snakemake's logger.

    A job leaves a user's mistake beside its log, in a file with the ending ``.error`` (``begin`` in rules/job.sh).
    """

    def __init__(self, workflow: Any) -> None:
        super().__init__()
        self._workflow = workflow
        self._lines: list[str] = []

    def forget(self, jobs: Iterable[Any]) -> None:
        """Before the first job: remove the mistakes that ``jobs`` left in earlier runs.

        A job that never starts, say because Slurm refuses it, would seem to have made the old one again.
        """
        for job in jobs:
            for log in job.log:
                _mistake(log).unlink(missing_ok=True)

    def filter(self, record: logging.LogRecord) -> bool:
        event = getattr(record, "event", None)
        if event == LogEvent.ERROR:  # of a local job, before the next one: its command, at length
            return f"returned non-zero exit status {USER_ERROR}." not in record.getMessage()
        if event != LogEvent.JOB_ERROR or not record.log:
            return True
        error = _mistake(record.log[0])
        if not error.is_file():
            return True
        line = error.read_text().strip()
        if line not in self._lines:
            self._lines.append(line)
        job = next(job for job in self._workflow.dag.jobs if self._workflow.dag.jobid(job) == record.jobid)
        job._attempt = job.restart_times + 1  # the last one; the property would also drop the resources of the job
        record.event, record.args = None, ()
        record.msg = f"Job {record.jobid} failed ({job.message}): the reason follows when no other job runs"
        return True

    def say(self) -> None:
        """Print each mistake, once."""
        for line in self._lines:
            print(line, file=sys.stderr)


def _mistake(log: str) -> Path:
    """The file beside a job's log that holds the user's mistake, if one ended the job."""
    return Path(log).with_suffix(".error")

"""Show a user's mistake as one line, the last on the screen, and don't retry the job that failed because of it.

By default Snakemake prints the failed command three times and its whole log, and retries the job, which doesn't help a
user who has to correct a file. `FailedJobs` filters Snakemake's log, the only place that reports failed jobs under
every executor. All other failures are printed and retried as usual.
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

    A job leaves a user's mistake next to its log, in a file ending in ``.error`` (``begin`` in rules/job.sh).
    """

    def __init__(self, workflow: Any) -> None:
        super().__init__()
        self._workflow = workflow
        self._lines: list[str] = []

    def forget(self, jobs: Iterable[Any]) -> None:
        """Remove the mistakes that ``jobs`` left in earlier runs; called before the first job.

        Otherwise a job that never starts, for example because Slurm rejects it, would seem to repeat the old mistake.
        """
        for job in jobs:
            for log in job.log:
                _mistake(log).unlink(missing_ok=True)

    def filter(self, record: logging.LogRecord) -> bool:
        event = getattr(record, "event", None)
        if event == LogEvent.ERROR:  # of a local job: its command, at length; JOB_ERROR follows
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
        record.msg = f"Job {record.jobid} failed ({job.message}): the reason follows when the other jobs have ended"
        return True

    def say(self) -> None:
        """Print each mistake, once."""
        for line in self._lines:
            print(line, file=sys.stderr)


def _mistake(log: str) -> Path:
    """The file next to a job's log that holds the user's mistake, if there was one."""
    return Path(log).with_suffix(".error")

"""Start a job's processes and assign it GPUs."""

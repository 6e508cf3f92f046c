"""What starts a job's processes and gives it GPUs."""

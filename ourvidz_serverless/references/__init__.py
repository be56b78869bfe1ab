"""Pictures that a job brings."""

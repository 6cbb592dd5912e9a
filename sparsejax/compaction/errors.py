"""What compaction raises."""


class CompactionError(ValueError):
    """A channel cannot go, or the smaller model would compute something else."""

"""From parameters back to a checkpoint on disk: all or nothing."""

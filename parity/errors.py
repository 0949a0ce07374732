"""Errors that have an exit code of their own."""


class DeviceNotFound(RuntimeError):
    """The framework is not installed, or has no such device. Exit code 5."""


class NotComparable(ValueError):
    """There is nothing that could be compared. Exit code 3."""

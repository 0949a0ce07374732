"""Errors that have an exit code of their own."""


class DeviceNotFound(RuntimeError):
    """The framework is not installed, or has no such device. Exit code 5."""

"""Whether a file is being written right now, of which its times say nothing: they are set as a call of write(2) begins.

Linux leases no file to a reader that anybody has open for writing, so it is asked for one, and that is given back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal

# those whose leases are this system's own; others, of the network, refuse them for reasons of theirs
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs", "overlay"}


def has_writer(descriptor: int) -> bool:
    """Whether a program is known to have the file open for writing that ``descriptor`` has open for reading alone."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # of who opens it now, for SIGIO, which kills
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:  # other errors: it is another user's, or has no leases
        return error.errno == errno.EAGAIN and _file_system(os.fstat(descriptor).st_dev) in _LOCAL
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _file_system(device: int) -> str | None:
    """The kind that a device is mounted with; None: nobody says."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo") as mounts:
            for fields, _, of_device in (line.partition(" - ") for line in mounts):
                if fields.split()[2] == wanted:
                    return of_device.split()[0]
    except (OSError, IndexError):
        pass
    return None

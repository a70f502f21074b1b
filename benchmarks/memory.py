"""Memory of a process, on Linux."""

from pathlib import Path


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes.

    The value of getrusage is not used, because it includes the parent's before the fork."""
    return status_bytes("VmHWM")


def anonymous_memory() -> int:
    """Return the resident bytes of this process that are not of a mapped file."""
    return status_bytes("RssAnon")


def status_bytes(name: str) -> int:
    """Return a size that Linux states for this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    for line in status.splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}: the memory is not available")

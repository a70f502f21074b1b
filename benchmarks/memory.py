"""How much memory a benchmark took."""

from pathlib import Path


def peak_memory() -> int:
    """Bytes that this process had resident at most. Not getrusage's, which begins with those of the
    parent process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

"""Sets the title that `ps` and `top` show for this process.

Not for what it says: each process words its own.
"""

from setproctitle import setproctitle


def set_title(text: str) -> None:
    """Show `text` as this process's title; never raises, whatever a task's name contains."""
    setproctitle(text.encode(errors="replace").decode().replace("\0", " "))

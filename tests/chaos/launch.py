"""Runs `wakaq worker` with a short lease, on a host of any name. Usage: launch.py TERM HOST MODULE.VARIABLE."""

import functools
import sys

import wakaq.supervisor.lease
import wakaq.supervisor.supervisor
from wakaq.cli import main

term, host, app = sys.argv[1:]
wakaq.supervisor.lease._host_identity = lambda: host
wakaq.supervisor.supervisor.Lease = functools.partial(
    wakaq.supervisor.lease.Lease, term=float(term)
)
main(["worker", f"--app={app}"])

"""Runs `wakaq worker` with a short lease, on a host of any name.

Usage: launch.py TERM HOST MODULE.VARIABLE.
"""

import functools
import sys

import wakaq.store.registry
import wakaq.supervisor.dispatcher
import wakaq.supervisor.lease
import wakaq.supervisor.supervisor
from wakaq.cli import main

term, host, app = sys.argv[1:]
wakaq.store.registry.host_identity = lambda: host
wakaq.supervisor.supervisor.Lease = functools.partial(
    wakaq.supervisor.lease.Lease, term=float(term)
)
wakaq.supervisor.dispatcher.BEAT = float(term) / 5
main(["worker", f"--app={app}"])

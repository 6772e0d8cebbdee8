"""Measures WakaQ beside other Python queues and beside bare Redis loops, on Linux.

`pip install -r benchmarks/requirements/driver.txt`, then `python -m benchmarks table --quick`.
Every peer gets a virtual environment of its own, under `~/.cache/wakaq-benchmarks` or
`$BENCH_HOME`, and a private server.
"""

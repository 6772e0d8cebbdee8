"""Measures WakaQ beside other Python queues and beside bare Redis loops. Run it with `python -m benchmarks`."""

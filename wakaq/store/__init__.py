"""All that knows Redis: connections, keys, scripts, and what is said over them.

Not for deciding anything: callers decide, Redis keeps. Nothing outside this folder imports redis.
"""

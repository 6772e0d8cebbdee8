"""A worker process: a file for each of its threads, main (`executor`), control and async (`async_runner`).

Sync and async messages wait in a deque each: control appends, main or async takes from the left, and a recall takes from
the right, so that each message is had by exactly one of them. A message's state goes to shared memory before it goes over
the socket, so that what a SIGKILL leaves behind tells which tasks were finished, which were running and which had not begun.
"""

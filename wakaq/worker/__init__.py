"""A worker process: one file a thread, and what they share.

==============  =====================================================  ==========================================
thread          owns                                                   speaks to
==============  =====================================================  ==========================================
main            the running sync task, the progress row                supervisor (Ready, Done, Outcome)
control         the other end of every frame                           supervisor (Recalled), backlog, event loop
async           the running async tasks                                supervisor (Done, Outcome)
==============  =====================================================  ==========================================

The backlog is a deque: control appends, main takes from the left, and a recall takes from the right, so that each message
is had by exactly one of them. A message's state goes to shared memory before it goes over the socket, so that what a
SIGKILL leaves behind tells which tasks were finished, which were running and which had not begun.
"""

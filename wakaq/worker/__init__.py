"""A worker process: it runs tasks, and tells its supervisor what became of them.

Three threads, a file each, around `assignments`, which all of them may touch:

==============  ================  ==============================================================
thread          file              what it does
==============  ================  ==============================================================
main            `sync_runner`     runs sync tasks, one after another; signals need this thread
wakaq-control   `control`         hears the supervisor, also while a task computes
wakaq-async     `async_runner`    runs async tasks on an event loop, many at once; only in an
                                  application that has async tasks or async hooks
==============  ================  ==============================================================

`main` sets the process up and hands over to them; `outcome` decides what becomes of a task that did
not just return; `orphan` takes the supervisor's place for what still runs when that has died.
"""

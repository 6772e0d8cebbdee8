"""A worker process: it runs tasks, and tells its supervisor what became of them.

Three threads, a file each, around `assignments`, which all of them may touch:

==============  ================  ==================================================================
thread          file              what it does
==============  ================  ==================================================================
main            `sync_runner`     runs sync tasks, one after another; signals need this thread.
                                  While it has nothing to run, it hears the supervisor itself
wakaq-control   `control`         hears the supervisor, also while a task computes
wakaq-async     `async_runner`    runs async tasks on an event loop, many at once; only in an
                                  application that has async tasks or async hooks
==============  ================  ==================================================================

`main` sets the process up and hands over to them; `outcome` decides what becomes of a task that did
not just return; `orphan` takes the supervisor's place for what still runs when that has died.

Where a report goes: the thread that ran a task writes the task's row (`wakaq.progress`), then
settles it in `assignments`, which sends a frame (`wakaq.channel`); for an orphan, the control
thread takes it instead. So a worker that is killed between the two has left the truth in its row.

How it ends: told to stop, the main thread ends after its task, and the process with it; the
supervisor stops only a worker that has nothing left. If the supervisor dies, the control thread
becomes an `Orphan`, hands back what was not begun, and waits for what runs; the main thread waits
for the control thread.

Not for starting workers, nor for time limits: see `wakaq.supervisor`.
"""

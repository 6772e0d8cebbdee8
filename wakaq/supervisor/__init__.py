"""The supervisor process: one file a thread, and pure parts beside them. It runs no task code.

Its threads, and what each owns. Each state has one owner: other threads read a snapshot, or post a
call to the owner's mailbox (`wakaq.service`). A thread's name is `wakaq-` and the word here; but
the main thread keeps Python's name, and a waker's name ends with its queue.

==========  ============  ===========================================  =============================
thread      file          owns                                         speaks to
==========  ============  ===========================================  =============================
main        `supervisor`  ordering and reaping workers, signals, the   fork server, dispatcher,
                          order of shutdown                            `Child.kill`
dispatcher  `dispatcher`  every claim: what is in flight, who has it;  workers, turns, main
                          each worker's capacity
turns       `sender`      the request to Redis that is under way; one  Redis, dispatcher
                          thread a slot group
waker       `waker`       nothing: waits for work while workers are    Redis, turns
                          idle; one thread a queue
heartbeat   `heartbeat`   who has not answered since when              workers; `Child.kill`
timeouts    `timeouts`    who is to be killed for its task             `Child.signal`, `Child.kill`
memory      `memory`      the victim; only with `max_mem_percent`      dispatcher, `Child.kill`
broadcast   `broadcast`   the subscription                             Redis, dispatcher
promoter    `promoter`    nothing: moves what is due; one thread a     Redis
                          slot group
lease       `lease`       what was seen of other supervisors; renews   Redis
                          this one's entry
scheduler   (not here)    when schedules are due: `wakaq.scheduler`,   Redis
                          only with `--scheduler`
==========  ============  ===========================================  =============================

A supervisor's proof of life is the number of its last turn, so it is the dispatcher's. The
heartbeat is for workers, which it pings. The lease's thread does not renew the lease: it watches
the numbers of the others, and renews this one's entry, for people.

From the waker down each is a `Service`: a `tick` that neither loops nor sleeps. The pure parts:
`child` (the record of a worker), `prefetch` (how much it is given), `worker_exit` (what becomes of
what a dead one had), and `old_release` (steps for the lease's thread).

None of them writes the log: what they log goes through a bounded queue to a thread of its own,
wakaq-log (`wakaq.log.start_queue`), so that a log which blocks or raises holds up none of them.

Processes. Workers are not forked from here, where threads hold locks that a fork would copy in the
locked state, but by the fork server (`fork_server`), which the main thread forks before there are
other threads. No lock is shared with a worker either: one whose holder is SIGKILLed is never free
again. Supervisor and worker share a pipe, and memory in which the worker says what it is doing
(`wakaq.progress`), to be read also after its death.

Frames on the pipe (`wakaq.channel`), whose supervisor's end never blocks:

=========  ==============================  =========  ==============================================
to it      sent by                         from it    what the dispatcher does
=========  ==============================  =========  ==============================================
Assign     dispatcher: payloads, a row     Ready      gives it work
           for each                        Failed     notes why, for the main thread
Recall     dispatcher: give back what is   Recalled   puts these back to the front
           not begun                       Done       has these acknowledged
Adopted    dispatcher: other numbers       Outcome    has this one settled as the worker decided
Ping       heartbeat
Stop       dispatcher: exit
=========  ==============================  =========  ==============================================

How a worker ends. The dispatcher sees the end of its pipe, or, where something else holds that
open, the main thread sees the end of its process. The dispatcher hears the last frames, decides
about what it still had, and tells the main thread, which reaps it, logs how it ended once the fork
server has told, and has its slot filled.

Who kills it, by `Child.kill`: timeouts, memory and heartbeat for what they watch, and main one that
was told to exit and does not, or all of them: after `shutdown_timeout`, at a second signal or
SIGQUIT, and where workers cannot start.

Shutdown, in this order:

1. main: promoter, broadcast and scheduler are told to end, and no worker is started any more.
2. dispatcher: the wakers are told to end; nothing is claimed; suspects that wait and what workers
   have not begun go back; each worker is told to exit when it has nothing left.
3. main: waits until all workers are reaped. After `shutdown_timeout`, at a second signal or at
   SIGQUIT, it kills them, and what they ran goes back uncounted.
4. main: joins the threads of 1 and 2, as what they wait for must not come after the last turn.
5. dispatcher: settles the rest, leaves the registry by a last turn in each slot group, and ends;
   if Redis is away, after a while without.
6. main: ends lease, heartbeat, timeouts and memory, which held until now, then the fork server.
"""

"""The supervisor process: one file a thread. It runs no task code.

==============  =====================================================  ==========================================
thread          owns                                                   speaks to
==============  =====================================================  ==========================================
main            spawning, reaping, signals, the order of shutdown      dispatcher
dispatcher      every claim, the children's capacity, all frames in    Redis, children, main
heartbeat       who has not answered since when                        children (Ping), `Child.kill`
timeouts        who is to be killed for its task                       `Child.signal`, `Child.kill`
memory          the victim                                             dispatcher, `Child.kill`
broadcast       the subscription                                       Redis, dispatcher
promoter        nothing                                                Redis
lease           our heartbeat, what was seen of the others'            Redis
scheduler       when schedules are due, with --scheduler               Redis
==============  =====================================================  ==========================================

The dispatcher is several files: `dispatcher` hears children and events, `crew` spreads work over the children, `claimer`
asks Redis, `ledger` makes each settlement true once, and a `watcher` a queue waits, in the dispatcher's selector, for the
server to say that there is work for an idle machine.

State has one owner, and others post calls to its mailbox (`supervisor.service`); no lock is shared with a worker, as the
lock of a process that is SIGKILLed is never free again. What a worker does is read from its progress row (`wakaq.frames`), also
after its death. Workers are forked by a clean fork server, never from here, where threads hold locks.

Shutdown, in this order: promoter and broadcast end; the dispatcher claims nothing more and recalls what was not started;
each worker exits after its task; the dispatcher settles the rest and ends; the other services end; the supervisor takes
itself off the registry.
"""

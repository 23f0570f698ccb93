"""Runs: their directories, what they say of themselves, the queue, and the process that trains them in turn.

directory    a run's folder, its name, and how to find it again
events       what a run says of itself, one line each (log appends and follows; sketch reads a long one fast)
damage       whether a checkpoint or an adapter is what was written
status       where it stands now (liveness: whether its process still works; process identifies it; locks)
view         a run as its events tell it: the one reader behind every screen and verb (following waits on it)
telemetry    what the machine did meanwhile (energy sums its power up)
describe     events in words (standing: a run's state in a sentence for a voice)
actions      what can be done with runs, once for keys and verbs (control asks a running trainer; trash keeps
             what was deleted; leftovers deletes what killed processes left;
             check verifies and repairs)
queue        the runs that wait (entries: the folder that says which)
runner       takes them one at a time; detached starts it, and the trainers
endings      how an attempt ended (shortage: of what it ran out; retry: what to change and try again)
news         what is worth telling of that (notify tells it)
"""

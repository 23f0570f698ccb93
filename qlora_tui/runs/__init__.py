"""Runs: their directories and events, the queue, and the process that trains them.

directory       a run's folder, its name, and how to find it again
events          the events of a run, one JSON line each
event_log       writes, follows and samples these lines
telemetry       GPU and host metrics during a run, and its energy
view            a run as its events describe it: the one reader behind every screen and command
status          a run's current state, and whether the process behind it is still working
process         identifies processes, and starts those that outlive their parent
describe        events and states as sentences, and a run's events as they arrive
run_summary     a run in one line, for lists: whether its result is usable, and whether it worked
actions         submits, resumes, renames and deletes runs, and restores them from the trash
control         sends a request to a running trainer
preflight       checks a recipe before a launch; data_checks its data, and counts the run's steps
exact_memory    the exact form of the memory estimate, traced by a child and kept
expected_time   how long a run will be: its steps, and their time by the speed of earlier runs
step_probe      what three steps of a recipe take, trained in a child and discarded
suggestions     settings with reasons, derived from facts that suggestion_facts gathers
evidence        publications and earlier runs that suggestions rest on
doctor          checks GPU, memory, disks, queue and libraries
suggested_fix   a fix for a warning that one key applies
run_queue       the waiting runs
devices         which devices runs may use and have, and their locks
gate            says whether a run may train now: by the hours, and by other programs on its GPU
holds           the reasons to wait, decided from readings
runner          starts each run's trainer when its devices are free
supervision     supervises a run from attempt to attempt
outcomes        how an attempt ended
slurm           what the jobs of a cluster ask for, and its commands
slurm_runs      submits, cancels and watches the jobs of runs
slurm_time      proposes the time limit of a job
slurm_job       what a job does: trains one run, and lets a time limit be a pause
retry           what the next attempt changes after memory ran out, and what the user can change
notify          reports a run's end to a command or a webhook
check           verifies runs, and repairs them
damage          whether a checkpoint or an adapter is intact
leftovers       deletes what killed processes left behind, wherever this program writes
measuring       measures a run in a process of its own, with the run's lock held
row_losses      the loss of each training row before and after a run, and its class
task_metrics    what base and adapter answer to validation prompts, and whether the difference is chance
metrics_table   the steps of a run as a CSV or Parquet table, and how a table or picture is saved
length_costs    memory and time at other sequence lengths
chat_choices    answers that the user chose or edited in the chat, as data to train on
servers         running servers, as their state files say
exports         exports of adapters that run in the background
"""

"""Runs: their directories and events, the queue, and the process that trains them.

directory       a run's folder, its name, and how to find it again
events          the events of a run, one JSON line each
event_log       writes, follows and samples these lines
telemetry       GPU and host metrics during a run, and its energy
view            a run as its events describe it: the one reader behind every screen and command
status          a run's current state, and whether its process is still working
process         identifies processes, and starts those that outlive their parent
describe        events and states as sentences, and a run's events as they arrive
run_summary     one-line summaries for lists: whether the result is usable, and whether the run worked
result_weights  the step of the weights that a run results in, and whether a saved step is better
main_settings   the settings in which runs most often differ, as columns of a list and as a line
actions         submits, resumes, renames and deletes runs, and restores them from the trash
control         sends a request to a running trainer
preflight       checks a recipe before a launch
data_checks     checks the data before a launch, and counts the run's steps
exact_memory    the exact form of the memory estimate, traced by a child process and cached
expected_time   the expected number of steps of a run, and their duration from the speed of earlier runs
step_probe      time and memory of three steps of a recipe, trained in a child process and discarded
suggestions     settings with reasons, derived from facts that suggestion_facts gathers
evidence        publications and earlier runs that suggestions rest on
doctor          checks GPU, memory, disks, queue and libraries
suggested_fix   a fix for a warning or failure, which one key applies
run_queue       the waiting runs
devices         the devices that runs may use or are using, and their locks
gate            decides whether a run may train now, given the hours and other programs on its GPU
holds           reasons for a run to wait, derived from readings
runner          starts each run's trainer when its devices are free
supervision     supervises a run from attempt to attempt
outcomes        how an attempt ended
slurm           the options of a cluster's jobs, and the commands of Slurm
slurm_runs      submits, cancels and watches the jobs of runs
slurm_time      proposes the time limit of a job
slurm_job       the program of a job: trains one run, and turns a time limit into a pause
memory_retry    after memory ran out: what the next attempt changes, and what the user can change
notify          reports a run's end to a command or a webhook
check           verifies runs, and repairs them
damage          whether a checkpoint or an adapter is intact
leftovers       deletes files that killed processes left behind, wherever this program writes
measuring       measures a run in a separate process that holds the run's lock
row_losses      the loss of each training row before and after a run, and how the row is classified
task_metrics    answers of base and adapter to validation prompts, and whether they differ by more than chance
metrics_table   the steps of a run as a CSV or Parquet table, and how a table or picture is saved
length_costs    memory and time at other sequence lengths
chat_choices    answers that the user chose or edited in the chat, as data to train on
servers         running servers, read from their state files
exports         exports of adapters that run in the background
"""

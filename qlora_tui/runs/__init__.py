"""Runs: their directories and events, the queue, and the process that trains them one after another.

directory       a run's folder, its name, and how to find it again
events          the events of a run, one JSON line each
event_log       writes and tails these lines
event_sampling  reads a long log quickly, by sampling its lines
view            a run as its events describe it: the one reader behind every screen and command
status          a run's current state
status_summary  the state in a sentence, for a screen reader
liveness        whether the process behind a run is still working
process         identifies processes by start tick, boot and machine
follow          waits for a run's next events, for the command line
telemetry       GPU and host metrics during a run
energy          adds up the measured power
describe        events as sentences
actions         actions on runs, shared by keys and commands; the app deletes through trash
initial_adapter the adapter that a run starts from, by the name of its run
preflight       checks a recipe before a launch; data_checks its data
step_limit      checks whether Max steps or Epochs ends a run
tracker_packages whether an experiment tracker is installed
machine_checks  checks GPU, disk and queue
readiness       checks whether this machine can train at all
control         sends a request to a running trainer
trash           deleted runs, which can be restored for a week
leftovers       deletes what killed processes left behind, wherever this program writes
damage          whether a checkpoint or an adapter is intact
check           verifies runs
repair          repairs the defects that a check reports
run_queue       the waiting runs
queue_entries   the folder that holds their order
runner          starts the trainers, one at a time
spawn           starts the runner, detached from the terminal
outcomes        how an attempt ended
trainer_log     the end of a trainer's log
memory_advice   what the user can do after memory ran out
retry           what the next attempt changes after memory ran out
notify          reports a run's end to a command or a webhook
chat_choices    answers that the user chose or edited in the chat, as data to train on
run_verdict     whether a run worked, in one sentence
defects         what is wrong with the result of a run that ended regularly
run_summary     a run in one line, for lists
row_losses      the loss of each training row before and after a run, and its class
metrics_table   the steps of a run as a CSV or Parquet table
task_metrics    what base and adapter answer to validation prompts, and whether the difference is chance
measuring       measures a run in a process of its own, with the run's lock held
length_costs    memory and time at other sequence lengths
exports         exports of adapters that run in the background
suggested_fix   a fix for a warning that one key applies
"""

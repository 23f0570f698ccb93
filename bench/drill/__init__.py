"""The fault drill: kills, damaged files, full disks and hostile input at random, with a seed.

    python -m bench.drill [--minutes 10] [--seed N] [--only ROW…] [--json]

Each row of the table is one kind of mishap (:data:`bench.drill.rows.ROWS`). Every attempt has its own seed,
which is printed where it fails: ``--seed`` with ``--only`` and ``--attempts 1`` repeats it.

``rows``      what is tried, by name
``program``   the command line in a forked child, with bounds on time, memory and output
``home``      private XDG directories
``samples``   valid files of every kind, small
``damage``    random changes of bytes
``damaged``   rows: a damaged file of each kind, through the commands that read it
``hostile``   rows: files made to take over the terminal, the machine or the program
``runs``      a tiny model and runs that real runners and trainers work on
``kills``     rows: kill -9 and signals
``disk``      rows: writes that fail in a real trainer, by a preloaded library
``power``     rows: power cuts on ext4, XFS and btrfs, where root may mount a disk image
"""

"""One dbt invocation, seen from inside: the other end of `dbtstream.frames`.

Runs under the project's own interpreter, which need not have dbtstream: stdlib and dbt only,
syntax floor Python 3.8 (dbt 1.8). `__main__` loads this folder as the package
`dbtstream_child`; nothing in dbtstream imports it, only tests of its pure parts do.

    main        the story of one invocation, in order: read this first
    engine      which dbt is installed, which adapter will be used
    control     the parent's lines on stdin, deadlines, its death
    kill_timer  the kernel's share of a deadline
    retry       dbt's `retry`, of an attempt that was cut off or of an earlier run
    stop        how dbt is interrupted, so that it really stops
    callback    dbt's events -> frames, on dbt's own threads
    event_names which events are log lines
    speedups    what dbt does slowly, done faster where it is the same
    readers     values out of dbt's messages
    plan        what dbt has selected, from the live task; the frames of it and around it
    nodes       one node of the manifest
    graph       the nodes around the selection, the hash of all
    connection  of the profile's target, what names a dataset
    matches     the project's selectors, resolved by dbt
    compiled    the SQL that a node ran
    columns     asks the adapter for the columns of what was built
    results     what invoke returned -> frames
    channel     the queue and the one thread that writes frames
    scrub       secrets out, lengths bounded, only what JSON can carry
    template    a process that has imported dbt, and that runs are forked from
    imports     what it imports, and what those imports read of the environment
    fingerprint what is installed, so that a template knows when it is out of date
    parse       a project parsed by dbt, put away for a template
    manifest    a template's parsed project, and what makes it a run's own
    project_files  all files that a parse read, and whether they have changed
"""

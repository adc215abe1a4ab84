"""A whole deployment on one thread and virtual time: the product's own processes over a network in memory.

    loop.py      an event loop whose time jumps, and the nodes (processes) that live on it
    network.py   connections between nodes: delay, bounded buffers, partitions, resets, silence
    cluster.py   hub, frontend, router and workers as nodes, started and restarted as a supervisor would
    workload.py  requests and the text that each must get
    client.py    HTTP clients that may be slow or leave
    faults.py    a seeded schedule of what goes wrong
    checks.py    what must hold
    run.py       one seed from start to verdict; `python -m stator.testing.sim --seed N --trace`

One seed is one course of events, to the byte: all time is the loop's, all randomness comes from the seed, nothing
leaves the thread.
"""

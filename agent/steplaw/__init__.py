"""The step law: what a step of the engine takes, learned from its own counters (METHOD sections 3 and 4).

    machine      what the hardware and the model could do at best
    law          seconds of a step; priors of its parameters
    series       a replica's counters as arrays over time
    population   the requests behind the counters: (prompt, reused) pairs as far as the data know them
    windows      stretches of time that serve as evidence
    fit          parameters from evidence
    worth        engine-seconds that reuse avoided, by the law

The only modules that load numpy; nothing that the daemon's tick imports comes here.
"""

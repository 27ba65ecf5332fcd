"""The step law: what a step of the engine takes, learned from its own counters (METHOD sections 3 and 4).

    machine      what the hardware and the model could do at best
    law          seconds of a step; priors of its parameters
    series       a replica's counters as arrays over time
    population   the requests behind the counters: (prompt, reused) pairs as far as the data know them
    windows      stretches of time that serve as evidence
    evidence     windows and lone requests, with the prefills in them
    fit          parameters from evidence
    worth        engine-seconds that reuse avoided, by the law
    mfu          how much attention there was, from the engine's own FLOP counter
    logged       a log of requests beside the counters
    laying       the same laid between the scrapes, by the counts alone
    explained    one figure taken apart, request by request
    forwards     the law run forwards, for the model
    alone        what single requests took, for the model
    supposed     what another store would have done

The only modules that load numpy; nothing that the daemon's tick imports comes here.
"""

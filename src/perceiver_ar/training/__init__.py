"""Training: from files to a run directory.

A run is a function of its recipe. The weights come from the seed, training window i from the seed and i, the randomness
of step k from the seed and k. So a run that was killed and resumed makes exactly the steps of an undisturbed one.
(With `max_time` instead of `max_steps`, the learning rate follows the clock, and no two runs are the same.)

With several devices every process (rank) runs all of this. Each takes a share of a step's micro-batches, or a
share of the prefix of the same micro-batches. All agree on the clock and on stopping; only the first one writes, prints
and evaluates.
"""

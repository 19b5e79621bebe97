"""Start a script in the processes that a plan needs, here or on the nodes of a cluster.

Read in this order: ``spec.py`` (how many processes, and what they are told), ``cores.py`` (what
this machine has for them), ``cluster.py`` (the same as a command or a Slurm file), ``streams.py``
(one stream of output out of many), ``elastic.py`` (starting them). Only the last one needs torch.
"""

"""The cluster backend: the same plan over processes, on torch's own stages and schedules.

Read in this order: ``launch.py`` and ``torchrun.py`` (the processes of a plan), ``rendezvous.py``
and ``consistency.py`` (the start), ``executable.py`` (lowering, and what the loop drives),
``batches.py`` (which microbatches a replica runs, in which runs), ``pipeline.py`` (torch's stages
and schedule for one shape of batch), ``module.py`` (what one stage computes), ``layout.py`` (which
rank runs what), ``sharding.py`` (who holds and updates what; sums over ranks, norm, update),
``checkpoints.py`` (one checkpoint that all ranks write), ``heartbeat.py``,
``watchdog.py`` and ``waiting.py`` (one failure stops all).
"""

"""The distributed target: the same plan over processes, on torch's own stages and schedules.

Read in this order: ``executable.py`` (what the loop drives), ``batches.py`` (which microbatches a
replica runs, in which runs), ``same_batch.py`` (all ranks were given the same batch),
``pipeline.py`` (torch's stages and schedule for one shape of batch), ``module.py`` (what one stage
computes), ``layout.py`` (which rank runs what), ``gradients.py`` (sums over ranks, norm, update),
``sharding.py`` (optimizer state divided among replicas), ``state.py`` (whole weights, loading),
``saving.py`` (one checkpoint that all ranks write), ``notes.py`` (what ranks tell each other
meanwhile), ``faults.py`` (one failure stops all; ``doing.py``, ``bulletin.py``, ``farewell.py``
are its eyes, ears and voice), ``joining.py`` and ``agreement.py`` (the start).
"""

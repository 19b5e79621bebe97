"""The distributed target: the same plan over processes, on torch's own stages and schedules.

Read in this order: ``executable.py`` (what the loop drives), ``pipeline.py`` (torch's stages and
schedule for one shape of batch), ``module.py`` (what one stage computes), ``layout.py`` (which
rank runs what), ``gradients.py`` (sums over ranks, norm, update), ``state.py`` (whole weights,
loading), ``saving.py`` (one checkpoint of many ranks), ``notes.py`` (what ranks tell each other
meanwhile), ``faults.py`` (one failure stops all; ``doing.py``, ``bulletin.py``, ``farewell.py``
are its eyes, ears and voice), ``joining.py`` and ``agreement.py`` (the start).
"""

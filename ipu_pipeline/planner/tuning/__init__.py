"""Search every setting of an IPU pipeline for a given batch and pod.

Read the files in this order: ``space.py`` (what is searched), ``cells.py`` (seconds and bytes of
one IPU's share), ``split.py`` (the best layers per IPU), ``search.py`` (the front), ``tune.py``
(a model by micro batch, and the outcome as plan and configuration), ``explain.py`` (text).
"""

"""The local target: every stage a thread of this process; no copies, weights shared.

Read in this order: ``executable.py`` (what the loop drives), ``step.py`` (one step),
``stage.py`` (what one stage does with one microbatch), ``runner.py`` (threads, order, failures),
``captures.py``, ``batch.py``.
"""

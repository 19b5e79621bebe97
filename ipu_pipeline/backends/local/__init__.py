"""The local target: every stage a thread of this process; no copies, weights shared.

Read in this order: ``executable.py`` (one step, and what the loop drives), ``stage.py`` (what one
stage does with one microbatch), ``runner.py`` (threads, order, failures), ``captures.py``,
``batch.py``.
"""

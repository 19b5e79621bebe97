"""Passes over plans: each takes a valid plan and annotates how its blocks run.

A pass is a frozen dataclass; its options are its fields, and its text form shows them:
``serialize_embedding{factor=4}``. A pass decides; a target acts on what it wrote into the plan.

Read the files in this order: ``serialize_embedding.py``, ``serialize_projection.py``,
``recompute.py``, one pass each; ``options.py``, the text form; ``registry.py``, passes by name;
``default_order.py``, which comes first and why; ``manager.py``, which runs them.

Nothing but this file is imported before a pass is asked for.
"""

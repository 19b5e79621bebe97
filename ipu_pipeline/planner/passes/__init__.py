"""Passes over plans: each takes a valid plan and annotates how its blocks run.

A pass is a frozen dataclass; its options are its fields, and its text form shows them:
``serialize_embedding{factor=4}``. A pass decides; a backend acts on what it wrote into the plan.
``annotations.py`` holds those of the package, ``manager.py`` finds and runs them.
"""

"""What runs beside poptorch: the same files in this package and, copied, in every bundle.

Python 3.8 and torch 1.13 are enough; nothing here imports ipu_pipeline. ``poptorch`` comes in as
an argument, so that the stand-in can take its place.
"""

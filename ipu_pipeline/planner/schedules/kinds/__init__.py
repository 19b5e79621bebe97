"""One file per schedule; each has one object ``SCHEDULE``. A new file is found by itself."""

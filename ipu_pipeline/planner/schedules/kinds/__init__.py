"""One file per shape of pipeline; each has its schedules in ``SCHEDULES``. New files are found."""

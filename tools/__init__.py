"""Programs that develop and check the package; not installed with it."""

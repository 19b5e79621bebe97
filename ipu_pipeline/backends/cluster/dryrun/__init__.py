"""One rank of a job of any size, played in one process; the messages of all."""

"""Starting the processes of a plan, here or on a cluster."""

"""Plans for Graphcore IPUs: in process where poptorch is installed, or as a bundle."""
